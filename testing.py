"""What the tests of several rooms share: random tensors, pictures, and a run of a moment."""

import contextlib
import csv
import functools
import itertools
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

import data
import machine
import optim
import plots
import recipe
import train
from recipe import TrainConfig
from vit import VisionTransformer, ViTConfig

# ---- Random tensors and pictures ----

seeds = st.integers(0, 2**31 - 1)
sizes = st.permutations(range(4, 10)).map(lambda p: p[:3])  # N, H, W: small, and no two are equal


def rng(seed):
    return torch.Generator().manual_seed(seed)


def noise(n, H, W, seed):
    return torch.randint(256, (n, 3, H, W), generator=rng(seed), dtype=torch.uint8)


def key(image):
    """The bytes of an image: what a Counter counts."""
    return image.contiguous().numpy().tobytes()


def peak_memory(call):
    """(what call() returns, by how many megabytes the memory of this process rose meanwhile)."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("needs Linux's peak memory")

    def megabytes(field):
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if field in x]
        return int(line.split()[1]) / 1000

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = megabytes("VmRSS")
    result = call()
    return result, megabytes("VmHWM") - before


def assert_rate(count, n, p):
    """A binomial count within 6 standard deviations: false alarm 2e-9 (used where n p >= 20)."""
    assert abs(count - n * p) < 6 * math.sqrt(n * p * (1 - p)), f"{count} of {n}, expected {n * p}"


def assert_frequencies(counts, expected):
    """Only the expected keys occur, and at their shares: chi-square with d degrees of freedom is
    above d + 2 sqrt(20 d) + 40 with a chance below exp(-20) = 2e-9 (Laurent and Massart 2000)."""
    assert set(counts) <= set(expected), f"{len(set(counts) - set(expected))} foreign outcomes"
    n, d = sum(counts.values()), len(expected) - 1
    chi2 = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert chi2 < d + 2 * math.sqrt(20 * d) + 40, f"chi-square {chi2:.0f} at {d} degrees of freedom"


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def write_picture(path, image, **options):
    """uint8 (3, H, W) as a file; PNG and BMP keep every bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)


def make_part(root, counts, seed=0, suffix=".png", S=6):
    """root/<class>/<number>: counts[class] pictures of S x S noise. Returns them all in order."""
    images = noise(sum(counts.values()), S, S, seed)
    names = [f"{name}/{i}{suffix}" for name, n in counts.items() for i in range(n)]
    for name, image in zip(names, images):
        write_picture(root / name, image)
    return images


def make_folder(root, suffix=".png", S=6):
    """train: 2 cats, 3 dogs; test: 1 cat, 2 dogs; S x S noise. Returns train and test (images,)."""
    train = make_part(root / "train", {"cat": 2, "dog": 3}, 0, suffix, S)
    return train, make_part(root / "test", {"cat": 1, "dog": 2}, 1, suffix, S)


def load_folder(root, S=6, **options):
    return data.load("folder", str(root), S, **options)


class Payload:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---- A run that takes a tenth of a second ----


def make_dataset(classes=("cat", "dog", "eel"), n=60, n_test=30, size=8, seed=0):
    """Noise, a little brighter for higher classes: can be learned, and not in one epoch."""
    parts = []
    for count in (n, n_test):
        labels = torch.arange(count) % len(classes)
        noise = torch.randint(0, 160, (count, 3, size, size), generator=rng(seed + count))
        parts += [(noise + 40 * labels[:, None, None, None] % 240).clamp(0, 255).byte(), labels]
    return data.Dataset(list(classes), *parts, (0.4, 0.45, 0.5), (0.2, 0.25, 0.3))


DATASET = make_dataset()
TINY = """--dataset shapes --device cpu --image-size 8 --patch-size 4 --dim 8 --depth 1 --heads 2
    --epochs 2 --batch-size 8 --val-size 20 --lr 0.01 --dropout 0""".split()  # 5 steps an epoch
# Everything that has a state or draws random numbers, at once.
FULL = """--epochs 3 --depth 2 --dtype float16 --dropout 0.1 --attn-dropout 0.1 --drop-path 0.3
    --ema-decay 0.9 --grad-clip 1 --label-smoothing 0.1 --mixup 0.8 --cutmix 1""".split()
PLOTS = {name: f for name, f in vars(plots).items() if name.startswith("plot_")}
FSYNC = os.fsync  # before tiny_world() replaces it
make_parser = functools.cache(recipe.make_parser)  # it reads its own source
WALL_CLOCK = ("images_per_second", "mfu", "seconds")  # what may differ between two equal runs


def no_picture(*_):
    """In place of a plot."""


@contextlib.contextmanager
def tiny_world():
    """Inside, "shapes" is DATASET; there are no pictures, and the machine is not measured."""

    def load(dataset, data_dir, image_size, download_url=None, load=data.load, **options):
        if dataset != "shapes":
            return load(dataset, data_dir, image_size, download_url, **options)
        cut = {
            k: getattr(DATASET, k)[..., :image_size, :image_size]
            for k in ("train_images", "test_images")
        }
        return replace(DATASET, **cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        patch.setattr(machine, "measure_peak", lambda *_: 1e12)
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # 16 bits, too
        facts = {"torch": "2", "commit": "c", "device": "cpu"}
        patch.setattr(machine, "versions", lambda *_: facts)
        # else a third of a tiny run's time: Matplotlib's settings, the parser that reads its own
        # source, and the wait for the disk, for which test_checkpoint.py has its own tests
        draw = plots.draw
        patch.setattr(plots, "draw", lambda plot, *_: plot is no_picture or draw(plot, *_))
        for name in PLOTS:
            patch.setattr(plots, name, no_picture)
        patch.setattr(recipe, "make_parser", make_parser)
        patch.setattr(os, "fsync", lambda file: None)
        yield


def run(*flags, out="out"):
    """The exit code of a tiny run; bad input ends in SystemExit, which has the same number."""
    try:
        return train.main([*TINY, "--out", str(out), *map(str, flags)])
    except SystemExit as exit:
        return exit.code


def flat(thing, path=""):
    """Nested dictionaries and lists as one dictionary {path: number, text or tensor}."""
    if isinstance(thing, (dict, list, tuple)):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing)
        leaves = {}
        for key, value in items:
            leaves |= flat(value, f"{path}/{key}")
        return leaves or {path: type(thing).__name__}
    return {path: thing}


def contents(path):
    """All of a checkpoint but the wall clock and the software's versions, flat."""
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.pop("versions")["torch"]
    for row in checkpoint["history"]:
        for name in WALL_CLOCK:
            assert row.pop(name) > 0
    return flat(checkpoint)


def difference(a, b):
    """The first path at which two flat dictionaries differ in type, dtype or value; or None."""
    for path in [*a, *b]:
        if path not in a or path not in b or type(a[path]) is not type(b[path]):
            return path
        if isinstance(a[path], torch.Tensor):
            if a[path].dtype != b[path].dtype or not torch.equal(a[path], b[path]):
                return path
        elif a[path] != b[path]:
            return path
    return None


def outcome(path):
    """What a run came to: weights and log, without the recipe that is stored with them."""
    return {k: v for k, v in contents(path).items() if re.match("/(model|ema|history)", k)}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def read_csv(path="out/log.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tree(folder="."):
    """Every file below a folder with its bytes."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


class Kill(BaseException):
    """What main() does not know how to catch: the end of the process, as far as it can tell."""


def on_call(monkeypatch, owner, name, number, action):
    """Run action in place of the call with this number (from 1) of owner.name."""
    real, calls = getattr(owner, name), itertools.count(1)

    def replacement(*args, **kwargs):
        return action(*args) if next(calls) == number else real(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)


def kill(*_):
    raise Kill


def refusal(call, *args, **kwargs):
    """The text of the ValueError that this call ends in; it has one line."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def pretend(monkeypatch, accelerator):
    """There are two of these here, or none. (Unchecked, torch names what it was built for.)"""
    found = torch.device(accelerator) if accelerator else None

    def current_accelerator(check_available=False):
        return found if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])


def small_model(seed=0, K=3, **network):
    options = {"dim": 8, "depth": 2, "heads": 2, "dropout": 0.0} | network
    torch.manual_seed(seed)
    return VisionTransformer(ViTConfig(8, options.pop("patch_size", 4), num_classes=K, **options))


def small_state(seed=0, steps=20, pool="cls", **knobs):
    """A scrambled float64 model with everything around it, as train_step wants it."""
    config = TrainConfig(**{"lr": 0.01, "batch_size": 6, "seed": seed} | knobs)
    vit_config = ViTConfig(8, 4, num_classes=3, dim=8, depth=2, heads=2, dropout=0.0, pool=pool)
    state = optim.build_state(config, vit_config, steps, torch.device("cpu"))
    g = rng(seed)
    for name, p in state.model.double().named_parameters():
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        p.data = noise * (1.5 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5) + ("norm" in name)
    if state.ema:
        state.ema.double().load_state_dict(state.model.state_dict())
    return config, state


def small_batch(seed, B=6):
    g = rng(seed)
    images = torch.randn(B, 3, 8, 8, generator=g, dtype=torch.float64)
    return images, torch.rand(B, 3, generator=g).softmax(1)


# ---- Real processes ----

HERE = Path(train.__file__).parent
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}


def save_pictures(root, dataset=DATASET):
    """A dataset as a folder of PNGs."""
    for part in ("train", "test"):
        images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
        for i, (image, label) in enumerate(zip(images, labels)):
            path = Path(root, part, dataset.classes[label], f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
