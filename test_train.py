"""
The specification of train.py and evaluate.py: every test is a sentence about a run, its docstring
the formula or the reason.

    1 the recipe       2 optimizer and schedule   3 one step         4 averaged weights   5 learning
    6 the checkpoint   7 resume                   8 ending well      9 the log           10 evaluate
    11 bad input      12 real processes          13 a GPU that is not there
    14 the files

Three habits make the sentences bite:

- Whole checkpoints are compared, every tensor and number of them, to the bit. A comparison of
  weights alone forgives a forgotten scaler or average.
- Everything goes through main(argv), in this process, on 60 pictures of 8x8 pixels and a network
  of two small blocks. Only signals, kills and torchrun start processes of their own.
- Numbers are literals here, never read from the files under test.
"""

import ast
import copy
import csv
import errno
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import muon
import train
from train import TrainConfig
from vit import MultiHeadAttention, TransformerEncoderBlock, VisionTransformer, ViTConfig

# ---- A run that takes a tenth of a second ----


def rng(seed):
    return torch.Generator().manual_seed(seed)


def make_dataset(classes=("cat", "dog", "eel"), n=60, n_test=30, size=8, seed=0):
    """Noise, a little brighter for higher classes: can be learned, and not in one epoch."""
    parts = []
    for count in (n, n_test):
        labels = torch.arange(count) % len(classes)
        noise = torch.randint(0, 160, (count, 3, size, size), generator=rng(seed + count))
        parts += [(noise + 40 * labels[:, None, None, None] % 240).clamp(0, 255).byte(), labels]
    return data.Dataset(list(classes), *parts, (0.4, 0.45, 0.5), (0.2, 0.25, 0.3))


DATASET = make_dataset()
TINY = """--dataset shapes --device cpu --image-size 8 --patch-size 4 --dim 8 --depth 2 --heads 2
    --epochs 2 --batch-size 8 --val-size 20 --lr 0.01 --dropout 0""".split()  # 5 steps an epoch
# Everything that has a state or draws random numbers, at once.
FULL = """--epochs 4 --dtype float16 --dropout 0.1 --attn-dropout 0.1 --drop-path 0.3
    --ema-decay 0.9 --grad-clip 1 --label-smoothing 0.1 --mixup 0.8 --cutmix 1""".split()
PLOTS = {name: f for name, f in vars(evaluate).items() if name.startswith("plot_")}
VERSIONS, MEASURE_PEAK, PACK = train.versions, train.measure_peak, train.pack
WALL_CLOCK = ("images_per_second", "mfu", "seconds")  # what may differ between two equal runs


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """For this module: "shapes" is DATASET; no pictures; no measuring of the machine."""

    def load(dataset, data_dir, image_size, download_url=None, load=data.load):
        if dataset != "shapes":
            return load(dataset, data_dir, image_size, download_url)
        cut = {
            k: getattr(DATASET, k)[..., :image_size, :image_size]
            for k in ("train_images", "test_images")
        }
        return replace(DATASET, **cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        patch.setattr(train, "measure_peak", lambda *_: 1e12)
        patch.setattr(train, "versions", lambda *_: {"torch": "2", "commit": "c", "device": "cpu"})
        for name in PLOTS:
            patch.setattr(evaluate, name, lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has a folder of its own, and leaves no global switch behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


def run(*flags, out="out"):
    return train.main([*TINY, "--out", str(out), *map(str, flags)])


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


def pretend(monkeypatch, accelerator):
    """There are two of these here, or none. (Unchecked, torch names what it was built for.)"""
    found = torch.device(accelerator) if accelerator else None

    def current_accelerator(check_available=False):
        return found if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def small_state(seed=0, steps=20, pool="cls", **recipe):
    """A scrambled float64 model with everything around it, as train_step wants it."""
    config = TrainConfig(**{"lr": 0.01, "batch_size": 6, "seed": seed} | recipe)
    vit_config = ViTConfig(8, 4, num_classes=3, dim=8, depth=2, heads=2, dropout=0.0, pool=pool)
    state = train.build_state(config, vit_config, steps, torch.device("cpu"))
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


def test_the_comparison_of_checkpoints_notices_one_changed_number():
    """Support code is tested too."""
    a = flat({"x": [1.0, {"y": torch.ones(2)}], "z": {}, "n": None})
    assert difference(a, copy.deepcopy(a)) is None and len(a) == 4
    for path, value in {"/x/1/y": torch.tensor([1.0, 1.0 + 1e-7]), "/x/0": 1, "/z": "list"}.items():
        assert difference(a, a | {path: value}) == path
    assert difference(a, a | {"/new": 0}) == "/new" == difference(a | {"/new": 0}, a)


def test_the_tiny_run_learns_and_chooses():
    """Else equal ends would prove nothing."""
    assert run("--epochs", 12, "--mixup", 0, "--cutmix", 0, "--randaugment-ops", 0) == 0
    accuracies = [float(row["val_accuracy"]) for row in read_csv()]
    assert len(set(accuracies)) > 2 and max(accuracies) > 0.6


# ---- 1 The recipe ----


def test_the_deit_recipe_is_the_documented_one():
    """The README's table and DeiT's: what `python train.py` does. (ViTConfig: see test_vit.py.)"""
    assert asdict(TrainConfig()) == {
        "dataset": "cifar10",
        "data_dir": "data",
        "download_url": None,
        "val_size": 5000,
        "out": "out",
        "resume": False,
        "epochs": 300,
        "batch_size": 1024,
        "optimizer": "adamw",
        "lr": 1e-3,  # 5e-4 x 1024 / 512
        "weight_decay": 0.05,
        "pct_start": 0.3,
        "grad_clip": 0.0,
        "randaugment_ops": 2,
        "randaugment_magnitude": 9,
        "randaugment_prob": 1.0,
        "randaugment_fill": "black",
        "crop": "pad",
        "mixup": 1.0,
        "cutmix": 1.0,
        "mix_until": 1.0,
        "label_smoothing": 0.0,
        "ema_decay": 0.0,
        "eval_every": 1,
        "save_every": 1,
        "max_minutes": None,
        "seed": 0,
        "device": "auto",
        "dtype": "auto",
        "compile": None,
        "deterministic": False,
    }


def test_presets_set_real_fields_to_values_that_work():
    """deit is the defaults; the others differ from them in everything they name."""
    assert set(train.PRESETS) == {"deit", "strong", "demo"} and train.PRESETS["deit"] == {}
    defaults = asdict(TrainConfig()) | asdict(ViTConfig())
    for preset in train.PRESETS.values():
        train.build_configs(preset)
        for name, value in preset.items():
            assert value != defaults[name] and isinstance(value, type(defaults[name])), name


def test_the_limits_themselves_are_within_the_limits():
    """What is refused beyond them stands in BAD_INPUT, part 11."""
    TrainConfig(val_size=1, epochs=1, batch_size=1, mixup=0, cutmix=0, seed=2**32 - 1)
    TrainConfig(weight_decay=0, grad_clip=0, pct_start=0, label_smoothing=0, ema_decay=0, seed=0)
    TrainConfig(randaugment_ops=0, randaugment_magnitude=0, randaugment_prob=0, mix_until=0)
    TrainConfig(randaugment_magnitude=30, randaugment_prob=1, mix_until=1, eval_every=1)


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults():
    preset, flags = train.parse(
        ["--preset", "demo", "--epochs", "3", "--no-compile", "--dim", "32"]
    )
    assert flags == {"epochs": 3, "compile": False, "dim": 32} and preset == train.PRESETS["demo"]
    values, _ = train.resolve(preset, flags)
    assert (values["epochs"], values["dim"], values["depth"]) == (3, 32, 4)


@pytest.mark.parametrize(
    "argv, lr",
    [
        ("--batch-size 512", 5e-4),
        ("--batch-size 4096 --lr 0.002", 0.002),
        ("--preset strong --batch-size 512", 2e-3),
        ("--preset demo --batch-size 25", 1e-3),
        ("--preset demo", 2e-3),
        ("--lr 0.5", 0.5),
        ("", 1e-3),
    ],
)
def test_the_learning_rate_scales_with_the_batch_unless_it_is_given(argv, lr):
    """The linear rule of DeiT: lr / batch stays that of the preset."""
    preset, flags = train.parse(argv.split())
    assert train.build_configs({**preset, **flags})[0].lr == pytest.approx(lr, rel=1e-12)


def test_help_lists_every_field_with_its_default_and_its_reason(capsys):
    """One text to keep true: the comment beside the field is its help."""
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert end.value.code == 0 and "--preset" in text and "(default: deit)" in text
    for field in (*fields(TrainConfig), *fields(ViTConfig)):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", text), field.name
        assert f"(default: {field.default})" in text
    assert "share of the steps in which the rate rises (default: 0.3)" in text
    assert "hidden width of the MLP / dim (default: 4.0)" in text


def test_without_an_accelerator_the_full_recipe_stops_at_once(monkeypatch, capsys):
    """One line that says what it would take, and the two ways to go on. Nothing is written."""
    pretend(monkeypatch, None)
    assert train.main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--preset demo" in line and "--device cpu" in line and "300 epochs" in line
    # 300 epochs x 45,000 images x 3 passes x 730 MFLOP; that over 1e11 a second
    assert "3.0e+16 floating-point operations" in line and "about 3.4 days" in line
    assert not tree()


def test_auto_is_the_accelerator_that_is_there(monkeypatch):
    pretend(monkeypatch, "cuda")
    for name, kind in {"auto": "cuda", "cuda": "cuda", "cuda:1": "cuda:1", "cpu": "cpu"}.items():
        assert evaluate.pick_device(name) == torch.device(kind)
    wrong = {"mps": "there is cuda", "cuda:2": "there are 2", "tpu!": "unknown device"}
    for name, text in wrong.items():
        with pytest.raises(ValueError, match=text):
            evaluate.pick_device(name)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert evaluate.pick_device("cuda") == torch.device("cuda")
    pretend(monkeypatch, None)
    assert evaluate.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="there is only cpu"):
        evaluate.pick_device("cuda")


def test_the_dtype_is_the_fastest_one_that_the_device_really_has(monkeypatch):
    """A T4 (7.5) only emulates bfloat16; its is_bf16_supported() says yes all the same."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, dtype in {
        (9, 0): torch.bfloat16,
        (8, 0): torch.bfloat16,
        (7, 5): torch.float16,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert train.pick_dtype("auto", cuda) == dtype
    assert train.pick_dtype("auto", cpu) == train.pick_dtype("float32", cuda) == torch.float32
    assert train.pick_dtype("float16", cpu) == torch.float16


def test_compiling_is_the_default_where_triton_can_do_it_and_nowhere_else(monkeypatch):
    """Triton wants a GPU of compute capability 7.0, and does not exist on every system."""
    cuda, there = torch.device("cuda"), True
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: there or None)
    for capability, expected in {(9, 0): True, (7, 0): True, (6, 1): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert train.can_compile(cuda) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    there = False
    assert not train.can_compile(cuda) and not train.can_compile(torch.device("cpu"))


def test_the_announced_pace_is_augmentation_once_and_the_later_steps_times_their_number():
    """10 s to augment, a first step of 7 s that warms up, then 20 s each: 5 steps are 110 s."""
    assert train.pace([0, 10, 17, 37, 57], 5) == 110


def test_a_slow_epoch_is_announced_once_and_a_quick_one_is_not(monkeypatch, capsys):
    """`left` comes with the first epoch's line, which on a CPU may be hours away."""
    monkeypatch.setattr(train, "pace", lambda marks, steps: {5: 61.0}[steps])
    assert run("--epochs", 3) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about")]
    assert said == ["about 1:01 an epoch, 3:03 for 3 to go"]
    monkeypatch.setattr(train, "pace", lambda marks, steps: 60.0)
    assert run(out="quick") == 0
    assert "about" not in capsys.readouterr().out


# Another value for every flag of the recipe; the network's come last.
OTHER = {
    "val_size": 12,
    "epochs": 3,
    "batch_size": 4,
    "optimizer": "muon",
    "lr": 0.02,
    "weight_decay": 0.5,
    "pct_start": 0.6,
    "grad_clip": 0.01,
    "randaugment_ops": 1,
    "randaugment_magnitude": 20,
    "randaugment_prob": 0.5,
    "randaugment_fill": "mean",
    "crop": "none",
    "mixup": 0.0,
    "cutmix": 0.0,
    "mix_until": 0.5,
    "label_smoothing": 0.1,
    "ema_decay": 0.5,
    "eval_every": 2,
    "seed": 1,
    "dtype": "bfloat16",
    "image_size": 4,
    "patch_size": 2,
    "dim": 16,
    "depth": 1,
    "heads": 4,
    "mlp_ratio": 2.0,
    "dropout": 0.3,
    "attn_dropout": 0.3,
    "drop_path": 0.5,
    "pool": "mean",
}
# What the data decide, or the sitting; the tests below and those of part 8 show what these do.
NO_RECIPE = set(
    "dataset data_dir download_url out resume save_every max_minutes device compile".split()
)
NO_RECIPE |= {"deterministic", "in_channels", "num_classes"}


def flag(name):
    return "--" + name.replace("_", "-")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a finished tiny run, not to be written to."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert run(out=out) == 0
    return out


def test_every_flag_changes_something():
    """A knob that is parsed and never read is a lie: each field is read outside its definition."""
    names = {field.name for config in (TrainConfig, ViTConfig) for field in fields(config)}
    assert names == set(OTHER) | NO_RECIPE
    program = ast.parse(Path(train.__file__).read_text())
    program.body = [node for node in program.body if getattr(node, "name", "") != "TrainConfig"]
    attributes = [node for node in ast.walk(program) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if ast.unparse(node.value) in ("config", "run.config")}
    assert not {field.name for field in fields(TrainConfig)} - read


@pytest.mark.parametrize("name", OTHER)
def test_every_flag_of_the_recipe_changes_the_outcome_of_a_run(name, plain):
    """Alone, and in numbers: other weights or another log."""
    assert run(flag(name), OTHER[name]) == 0
    assert difference(outcome("out/last.pt"), outcome(plain / "last.pt"))


def test_crop_resized_is_a_third_kind_of_crop(plain):
    for crop in ("none", "resized"):
        assert run("--crop", crop, out=crop) == 0
    assert difference(outcome("none/last.pt"), outcome("resized/last.pt"))
    assert difference(outcome("resized/last.pt"), outcome(plain / "last.pt"))


def test_where_the_data_lie_reaches_the_loader(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load", lambda *args: seen.append(args) or DATASET)
    assert run("--data-dir", "d", "--download-url", "http://mirror", "--dataset", "cifar100") == 0
    assert seen == [("cifar100", "d", 8, "http://mirror")]


def test_compiling_compiles_each_block_and_leaves_no_trace_in_the_checkpoint(monkeypatch, plain):
    """torch.compile's wrapper would prefix every name with _orig_mod, DDP's with module."""
    seen = []

    def compile_(call, **options):
        assert options.pop("dynamic") is False and not any(options.values())
        seen.append([call.__self__, 0])

        def compiled(*args, mine=seen[-1]):
            mine[1] += 1
            return call(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    assert run("--compile") == 0 and len(seen) == 2  # blocks; 10 steps, 5 validations
    assert all(isinstance(block, TransformerEncoderBlock) and calls == 15 for block, calls in seen)
    assert difference(outcome("out/last.pt"), outcome(plain / "last.pt")) is None
    assert run("--compile", "--ema-decay", 0.9, out="ema") == 0 and len(seen) == 2 + 4
    assert [calls for _, calls in seen[2:]] == [15, 15, 2, 2]
    assert run("--no-compile", out="b") == run(out="c") == 0 and len(seen) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler hides its own, but not from an error
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_one_compiled_block_serves_all_and_computes_what_it_did(monkeypatch):
    """Two graphs for any depth: the first block drops no path. A rate in Python would make one
    graph a block, up to torch's limit of eight, and none beyond it."""
    config = ViTConfig(8, 4, num_classes=3, dim=8, depth=12, heads=2, dropout=0.0, drop_path=0.5)
    steps = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        recipe = TrainConfig(device="cpu", compile=compiled, optimizer="muon")
        state = train.build_state(recipe, config, 20, torch.device("cpu"))
        with torch.no_grad():
            state.model.blocks[0].attn.qkv.bias.normal_(generator=rng(0))
        state.model.eval()
        images = torch.randn(4, 3, 8, 8, generator=rng(1))
        steps.append([state.model(images)])
        state.model.train()
        for block in state.model.blocks:
            block.drop_path.keep.fill_(1.0)  # masks differ between compiled and eager
        steps[-1] += train.train_step(state, images, torch.full((4, 3), 1 / 3), recipe)
        steps[-1] += [p.grad for p in state.model.parameters() if p.grad is not None]
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 + 2  # one to evaluate, two to train


def test_deterministic_asks_torch_for_it_and_only_then(monkeypatch):
    """cuBLAS reads its variable when CUDA starts, so it has to be set before."""
    seen = []

    def spy(*_):
        env = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        seen.append((torch.are_deterministic_algorithms_enabled(), env))

    monkeypatch.setattr(train, "train", spy)
    assert run() == run("--deterministic") == 0
    assert seen == [(False, None), (True, ":4096:8")]


# ---- 2 Optimizer and schedule ----


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(pool):
    """Biases, norms, class token and positions are offsets: decay would pull them to zero."""
    _, state = small_state(pool=pool, weight_decay=0.25)
    names = {id(p): name for name, p in state.model.named_parameters()}
    matrix = re.compile(r"(patch_embed\.proj|qkv|attn\.proj|fc1|fc2|head)\.weight$")
    found = [
        (names[id(p)], g["weight_decay"]) for g in state.optimizer.param_groups for p in g["params"]
    ]
    assert sorted(found) == sorted((n, 0.25 if matrix.search(n) else 0.0) for n in names.values())


def one_cycle(step, total, pct_start, peak):
    """Half a cosine up from peak/25, half a cosine down to peak/25/10,000 (Smith 2018; torch)."""
    top, last = pct_start * total - 1, total - 1

    def cosine(start, end, share):
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    if step <= top:
        return cosine(peak / 25, peak, step / top)
    return cosine(peak, peak / 25 / 1e4, (step - top) / (last - top))


def spy_on_steps(monkeypatch, look):
    """look(state, images, targets) before every train_step; the list of what it returned."""
    real, seen = train.train_step, []

    def step(state, images, targets, config):
        seen.append(look(state, images, targets))
        return real(state, images, targets, config)

    monkeypatch.setattr(train, "train_step", step)
    return seen


def test_the_learning_rate_rises_once_falls_once_and_ends_at_its_floor(monkeypatch):
    """Every step of the run has its own rate; the peak is at 30 % of 20 steps; the log has the
    rate of each epoch's last step."""
    seen = spy_on_steps(
        monkeypatch, lambda state, *_: [g["lr"] for g in state.optimizer.param_groups]
    )
    assert run("--epochs", 4, "--lr", 0.03) == 0
    expected = [one_cycle(step, 20, 0.3, 0.03) for step in range(20)]
    assert max(expected) == expected[5] == pytest.approx(0.03)
    for rates, rate in zip(seen, expected, strict=True):
        assert rates == pytest.approx([rate] * len(rates), rel=1e-9)
    assert [float(row["lr"]) for row in read_csv()] == pytest.approx(expected[4::5], rel=1e-9)


@pytest.mark.parametrize("pct_start, equal_to", [(0.0, 0.0), (0.1, 0.0), (0.2, 0.2)])
def test_a_rise_of_no_or_one_step_is_no_rise(pct_start, equal_to, monkeypatch):
    """torch divides by (steps of the rise - 1): pct_start x 10 steps = 1 must not end the run."""
    seen = spy_on_steps(monkeypatch, lambda state, *_: state.scheduler.get_last_lr()[0])
    assert run("--pct-start", pct_start) == 0
    expected = [one_cycle(step, 10, equal_to, 0.01) for step in range(10)]
    assert seen == pytest.approx(expected, rel=1e-9)


def test_the_betas_follow_the_recipe_through_the_whole_schedule(monkeypatch):
    """OneCycleLR's default would cycle beta1 between 0.85 and 0.95."""
    seen = spy_on_steps(
        monkeypatch, lambda state, *_: [g["betas"] for g in state.optimizer.param_groups]
    )
    assert run() == 0
    assert len(seen) == 10 and {betas for groups in seen for betas in groups} == {(0.9, 0.999)}


def newton_schulz(sigma, steps=5):
    """What Jordan's five polynomials make of a singular value."""
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return sigma


@pytest.mark.parametrize("rows, columns", [(5, 3), (3, 5), (4, 4), (7, 1)])
def test_orthogonalising_keeps_the_singular_vectors_and_levels_the_values(rows, columns):
    """U S V^T -> U f(S / |S|) V^T for each matrix of the stack by itself; f is near 1."""
    matrices = torch.randn(6, rows, columns, generator=rng(rows), dtype=torch.float64)
    matrices *= 10.0 ** torch.arange(-3, 3).view(6, 1, 1)
    before = matrices.clone()
    levelled = muon.orthogonalize(matrices)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    S = newton_schulz(S / (S.norm(dim=1, keepdim=True) + 1e-7))
    torch.testing.assert_close(levelled, (U * S[:, None]) @ V, rtol=0, atol=1e-9)
    assert torch.equal(matrices, before)
    even = newton_schulz(torch.linspace(0.1, 1, 1000, dtype=torch.float64))
    assert 0.67 < even.min() and even.max() < 1.21


def test_orthogonalising_a_gradient_of_zeros_gives_zeros():
    assert torch.equal(muon.orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def two_groups(seed):
    """Three matrices of one shape for Muon, a matrix and a vector for AdamW, in float64."""
    make = [
        torch.randn(*shape, generator=rng(seed + i), dtype=torch.float64)
        for i, shape in enumerate([(4, 6), (4, 6), (4, 6), (3, 4), (5,)])
    ]
    parameters = [nn.Parameter(tensor) for tensor in make]
    groups = [
        {"params": parameters[:3], "weight_decay": 0.3, "muon": True},
        {"params": parameters[3:4], "weight_decay": 0.3, "muon": False},
        {"params": parameters[4:], "weight_decay": 0.0, "muon": False},
    ]
    return parameters, groups


@pytest.mark.parametrize("seed", range(3))
def test_muon_is_its_recurrence_for_the_blocks_and_adamw_for_the_rest(seed):
    """M <- 0.95 M + 0.05 G, step along orth(0.95 M + 0.05 G), 0.2 sqrt(max(rows, columns)) long."""
    parameters, groups = two_groups(seed)
    expected, _ = two_groups(seed)
    optimizer = muon.Muon(groups, lr=0.1, fused=True)
    adamw = torch.optim.AdamW(
        [
            {"params": expected[3:4], "weight_decay": 0.3},
            {"params": expected[4:], "weight_decay": 0.0},
        ],
        lr=0.1,
        fused=True,
    )
    momenta = [torch.zeros(4, 6, dtype=torch.float64)] * 3
    for step in range(4):
        for i, (p, q) in enumerate(zip(parameters, expected, strict=True)):
            p.grad = torch.randn(p.shape, generator=rng(100 * seed + 10 * step + i)).double()
            q.grad = p.grad.clone()
        for group in [*optimizer.param_groups, *adamw.param_groups]:
            group["lr"] = lr = 0.1 / (step + 1)
        for i, q in enumerate(expected[:3]):
            momenta[i] = 0.95 * momenta[i] + 0.05 * q.grad
            U, S, V = torch.linalg.svd(0.95 * momenta[i] + 0.05 * q.grad, full_matrices=False)
            direction = (U * newton_schulz(S / S.norm())) @ V
            with torch.no_grad():
                q.copy_(q - lr * 0.3 * q - lr * 0.2 * math.sqrt(6) * direction)
        optimizer.step()
        adamw.step()
    for p, q in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # |S| + 1e-7 in the code


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_muon_steps_as_torchs_own_does(shape):
    """torch.optim.Muon, by other hands, computes in bfloat16: two digits agree."""
    ours, theirs = (nn.Parameter(torch.randn(*shape, generator=rng(1))) for _ in range(2))
    optimizer = muon.Muon([{"params": [ours], "weight_decay": 0.1, "muon": True}], lr=0.1)
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for step in range(5):
        ours.grad = torch.randn(*shape, generator=rng(step + 2))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
    assert (ours - start).abs().max() > 0.1 > 10 * (ours - theirs).abs().max()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else(pool):
    """Head, patches, positions are looked up or read out, not multiplied through: AdamW's."""
    _, state = small_state(pool=pool, optimizer="muon")
    names = {id(p): name for name, p in state.model.named_parameters()}
    groups = [g for g in state.optimizer.param_groups if g["muon"]]
    moved = [names[id(p)] for g in groups for p in g["params"]]
    matrices = [f"{m}.weight" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert sorted(moved) == sorted(f"blocks.{i}.{m}" for i in range(2) for m in matrices)
    assert all(len({p.shape for p in g["params"]}) == 1 for g in groups)


def test_an_overflowing_step_moves_nothing_with_muon_either():
    """Fused AdamW skips on its own when a GradScaler found an inf; Muon must be skipped too."""
    config, state = small_state(dtype="float16", optimizer="muon")
    images, targets = small_batch(0)
    for _ in range(2):
        train.train_step(state, images, targets, config)
    before = flat({"model": state.model.state_dict(), "opt": state.optimizer.state_dict()})
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in before.items()}
    handle = state.model.head.bias.register_hook(lambda grad: grad * math.inf)
    train.train_step(state, images, targets, config)
    handle.remove()
    after = flat({"model": state.model.state_dict(), "opt": state.optimizer.state_dict()})
    assert not difference(before, after)
    train.train_step(state, images, targets, config)
    assert difference(before, flat({"model": state.model.state_dict()}))


# ---- 3 One step ----


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_steps_equal_two_plain_optimizer_steps_on_a_copy(kind, grad_clip, seed):
    """The textbook lines, in float64. AdamW hides the gradient's scale in its first step, and SGD
    hides a missing decay group, so both, and two steps."""
    config, state = small_state(seed, grad_clip=grad_clip, weight_decay=0.25, lr=0.01)
    if kind == "SGD":
        state.optimizer = torch.optim.SGD(train.parameter_groups(state.model, 0.25), lr=0.01)
        state.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            state.optimizer, max_lr=0.01, total_steps=20, cycle_momentum=False
        )
    model = copy.deepcopy(state.model)
    offset = ("bias", "norm", "cls_token", "pos_embed")
    plain = [p for n, p in model.named_parameters() if any(part in n for part in offset)]
    decayed = [p for p in model.parameters() if not any(p is q for q in plain)]
    groups = [{"params": decayed, "weight_decay": 0.25}, {"params": plain, "weight_decay": 0.0}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.01)
    for step in range(2):
        images, targets = small_batch(10 * seed + step)
        loss, norm = train.train_step(state, images, targets, config)

        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, 20, 0.3, 0.01)
        optimizer.zero_grad()
        expected = F.cross_entropy(model(images).float(), targets)
        expected.backward()
        squares = sum((p.grad**2).sum() for p in model.parameters())
        if grad_clip and squares.sqrt() > grad_clip:
            for p in model.parameters():
                p.grad *= grad_clip / (squares.sqrt() + 1e-6)
        optimizer.step()
        assert grad_clip < squares.sqrt(), "nothing would be clipped"
        close(loss, expected.detach())
        close(norm, squares.sqrt())
    close(weights(state.model), weights(model))
    assert state.scheduler.last_epoch == 2


@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_gradients_are_clipped_after_unscaling_and_before_the_step(grad_clip):
    """A loss scale is a power of two, so a scaler at 2^16 must change no bit."""
    results = []
    for scaler in (
        torch.amp.GradScaler("cpu", enabled=False),
        torch.amp.GradScaler("cpu", 2.0**16),
    ):
        config, state = small_state(grad_clip=grad_clip)
        state.scaler = scaler
        numbers = [train.train_step(state, *small_batch(i), config) for i in range(3)]
        results.append(flat([numbers, weights(state.model)]))
    assert difference(*results) is None


def test_a_skipped_step_moves_neither_weights_nor_schedule_and_is_counted():
    """float16: one infinite gradient, and only the scale moves, by half."""
    config, state = small_state(ema_decay=0.5)
    state.scaler = torch.amp.GradScaler("cpu", 2.0**16)
    train.train_step(state, *small_batch(0), config)
    before = flat(copy.deepcopy(train.pack(state)))
    hook = state.model.head.bias.register_hook(lambda grad: grad * math.inf)
    loss, norm = train.train_step(state, *small_batch(1), config)
    hook.remove()
    after = flat(train.pack(state))
    assert loss.isfinite() and not norm.isfinite()
    assert difference(before, after) == "/scaler/scale" and after["/scaler/scale"] == 2.0**15
    assert (
        difference(before, after | {"/scaler/scale": 2.0**16, "/scaler/_growth_tracker": 1}) is None
    )
    train.train_step(state, *small_batch(1), config)
    assert state.scheduler.last_epoch == 2


def poison(monkeypatch, steps, scale=2.0**10):
    """A CPU scaler that grows often; an infinite gradient in these of every 5 steps."""
    real = train.build_state

    def build_state(*args):
        state, calls = real(*args), itertools.count()
        state.scaler = torch.amp.GradScaler("cpu", scale, growth_interval=2)
        state.model.head.bias.register_hook(
            lambda g: g * math.inf if next(calls) % 5 in steps else g
        )
        return state

    monkeypatch.setattr(train, "build_state", build_state)


def test_overflowing_gradients_alone_do_not_stop_a_float16_run(monkeypatch):
    """They are skipped and counted; the log's gradient norm is of the steps that were taken."""
    poison(monkeypatch, steps=(1, 4))
    assert run("--dtype", "float16") == 0
    rows = read_csv()
    assert [row["skipped_steps"] for row in rows] == ["2", "2"]
    assert all(0 < float(row["grad_norm"]) < math.inf for row in rows)
    assert torch.load("out/last.pt", weights_only=True)["scheduler"]["last_epoch"] == 6


def test_an_epoch_whose_every_step_is_skipped_has_a_gradient_norm_of_zero(monkeypatch):
    """A mean over nothing would be nan."""
    poison(monkeypatch, steps=range(5))
    assert run("--dtype", "float16") == 0
    assert [(r["skipped_steps"], r["grad_norm"]) for r in read_csv()] == [("5", "0.0")] * 2


@pytest.mark.parametrize(
    "dtype, loss, norm",
    [
        ("float32", math.nan, 1.0),
        ("float32", math.inf, 1.0),
        ("float32", 1.0, math.nan),
        ("float32", 1.0, math.inf),
        ("bfloat16", 1.0, math.inf),
        ("float16", math.nan, math.nan),
        ("float16", math.inf, math.inf),
    ],
)
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(
    dtype, loss, norm, monkeypatch, capsys
):
    """One line that says where; exit code 1. Without a scaler a gradient says it a step earlier."""
    assert run("--max-minutes", 1e-9, "--epochs", 3, "--dtype", dtype) == 0
    before = tree()
    capsys.readouterr()
    on_call(
        monkeypatch, train, "train_step", 3, lambda *_: (torch.tensor(loss), torch.tensor(norm))
    )
    assert run("--resume", "--epochs", 3, "--dtype", dtype) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "epoch 2, step 3 of 5" in line and f"{loss:g}" in line and "holds epoch 1 of 3" in line
    assert tree() == before


def test_nan_pixels_are_noticed_by_the_real_step(monkeypatch, capsys):
    real = train.train_step
    nan = lambda state, images, *rest: real(state, images * math.nan, *rest)  # noqa: E731
    on_call(monkeypatch, train, "train_step", 7, nan)
    assert run() == 1
    assert "epoch 2, step 2 of 5: the loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_soft_target_loss_equals_the_formula(seed):
    """- sum over classes of t log p, mean over images."""
    config, state = small_state(seed)
    images, targets = small_batch(seed)
    logits = state.model(images)
    loss, _ = train.train_step(state, images, targets, config)
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist()):
        log_sum = math.log(sum(map(math.exp, row)))
        total -= sum(t * (z - log_sum) for z, t in zip(row, target))
    assert loss.item() == pytest.approx(total / len(images), abs=1e-6)


def test_the_step_trains_under_autocast():
    """The arithmetic is bfloat16's; weights, gradients and loss stay float32."""
    config, state = small_state(dtype="bfloat16")
    state.model.float()
    seen = []
    state.model.blocks[0].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    loss, _ = train.train_step(state, small_batch(0)[0].float(), small_batch(0)[1], config)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert {p.grad.dtype for p in state.model.parameters()} == {torch.float32}


class Unread(TorchDispatchMode):
    """Refuses what makes the CPU wait for a GPU: reading a number, or asking how many there are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_in_bfloat16_reads_nothing_off_the_device(optimizer):
    """And in float16 it does, once the scaler has to be asked: so the watch sees what it should."""
    options = {"grad_clip": 1.0, "ema_decay": 0.9, "optimizer": optimizer}
    for dtype in ("bfloat16", "float16"):
        config, state = small_state(dtype=dtype, **options)
        state.model.float()
        state.ema.float()
        images, targets = (tensor.float() for tensor in small_batch(0))
        with Unread():
            if dtype == "float16":
                with pytest.raises(AssertionError, match="_local_scalar_dense"):
                    train.train_step(state, images, targets, config)
            else:
                train.train_step(state, images, targets, config)
                train.train_step(state, images, targets, config)


# ---- 4 Averaged weights ----


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_ema_is_the_stated_recurrence_and_never_touches_the_model(decay):
    """ema <- d ema + (1 - d) model after step t = 0, 1, ...; d = min(decay, (1 + t) / (10 + t))."""
    config, state = small_state(ema_decay=decay)
    bare_config, bare = small_state()
    expected = weights(state.model)
    for t in range(5):
        train.train_step(state, *small_batch(t), config)
        train.train_step(bare, *small_batch(t), bare_config)
        d = min(decay, (1 + t) / (10 + t))
        expected = {n: d * expected[n] + (1 - d) * p for n, p in weights(state.model).items()}
    close(weights(state.ema), expected)
    assert difference(weights(state.model), weights(bare.model)) is None
    assert bare.ema is None and not any(p.requires_grad for p in state.ema.parameters())


def test_the_average_is_what_is_validated_chosen_and_kept(monkeypatch):
    """Its accuracy chooses the epoch, and evaluation rebuilds it."""
    real, state = train.validate, {}

    def validate(run, model, part):
        if model is run.state.ema:
            state["ema"] = weights(model)
            return 0.0, [0.1, 0.9, 0.3][run.epoch]  # run.epoch: epochs done before this one
        return real(run, model, part)[0], 1.0 - run.epoch / 10

    monkeypatch.setattr(train, "validate", validate)
    assert run("--ema-decay", 0.9, "--epochs", 3) == 0
    best, last = (evaluate.load_checkpoint(f"out/{name}.pt") for name in ("best", "last"))
    assert best["best"] == {"epoch": 2, "accuracy": 0.9} and best["epoch"] == 2
    assert [row["ema_accuracy"] for row in last["history"]] == [0.1, 0.9, 0.3]
    rebuilt = weights(evaluate.build_model(last))
    assert difference(rebuilt, state["ema"]) is None
    assert difference(rebuilt, dict(last["model"]))


# ---- 5 Learning ----


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("labels", ["true", "random"])
def test_one_batch_can_be_memorised(seed, labels):
    """Plumbing: the shipped step drives the loss of a few pictures below 0.05."""
    config = TrainConfig(lr=0.02, seed=seed, weight_decay=0.0)
    vit_config = ViTConfig(8, 4, num_classes=3, dim=16, depth=1, heads=2, dropout=0.0)
    state = train.build_state(config, vit_config, 120, torch.device("cpu"))
    images = data.normalize(DATASET.train_images[:8], DATASET.mean, DATASET.std)
    target = DATASET.train_labels[:8]
    if labels == "random":
        target = torch.randint(3, (8,), generator=rng(seed))
    for _ in range(120):
        loss, _ = train.train_step(state, images, F.one_hot(target, 3).float(), config)
    assert loss < 0.05 and torch.equal(state.model(images).argmax(1), target)


def test_a_model_that_cannot_see_the_image_cannot_memorise_it():
    """Equal pictures: no loss below the entropy of the labels, ln 3 for three of each."""
    config = TrainConfig(lr=0.02)
    vit_config = ViTConfig(8, 4, num_classes=3, dim=16, depth=1, heads=2, dropout=0.0)
    state = train.build_state(config, vit_config, 60, torch.device("cpu"))
    targets = F.one_hot(torch.arange(9) % 3, 3).float()
    for _ in range(60):
        loss, _ = train.train_step(state, torch.ones(9, 3, 8, 8), targets, config)
        assert loss > math.log(3) - 1e-5
    assert loss < math.log(3) + 0.01


def batches(config, epoch, dataset=DATASET):
    images, labels = dataset.train_images, dataset.train_labels
    statistics = (dataset.mean, dataset.std, len(dataset.classes))
    return [
        torch.cat([x.flatten(1), t], 1)
        for x, t in train.epoch_batches(images, labels, *statistics, config, epoch)
    ]


def test_without_augmentation_a_batch_is_normalised_pictures_and_smoothed_labels():
    """(x / 255 - mean) / std, perhaps mirrored; 1 - e + e / K on the label, e / K elsewhere."""
    config = TrainConfig(
        batch_size=6, randaugment_ops=0, crop="none", mixup=0, cutmix=0, label_smoothing=0.3
    )
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (DATASET.mean, DATASET.std))
    originals = (DATASET.train_images / 255 - mean) / std
    seen = []
    args = (DATASET.train_images, DATASET.train_labels, DATASET.mean, DATASET.std, 3, config, 1)
    for images, targets in train.epoch_batches(*args):
        for image, target in zip(images, targets):
            distance = torch.minimum(
                *[(o - image).abs().amax((1, 2, 3)) for o in (originals, originals.flip(-1))]
            )
            seen.append(distance.argmin().item())
            assert distance.min() < 1e-5
            expected = torch.full((3,), 0.1)
            expected[DATASET.train_labels[seen[-1]]] += 0.7
            close(target, expected, 1e-6)
    assert sorted(seen) == list(range(60)) and seen != sorted(seen)


@pytest.mark.parametrize(
    "epochs, share, mixed", [(10, 0.5, 5), (3, 1.0, 3), (4, 0.0, 0), (10, 0.45, 4)]
)
def test_mixing_ends_after_the_stated_share_of_the_epochs(epochs, share, mixed):
    """A target with two numbers in it was mixed. Beta(10, 10) never draws a lambda of 0 or 1."""
    config = TrainConfig(
        batch_size=20, epochs=epochs, mix_until=share, mixup=10.0, cutmix=0.0, randaugment_ops=0
    )
    found = [
        any((b[:, -3:].amax(1) < 0.999).any() for b in batches(config, e))
        for e in range(1, epochs + 1)
    ]
    assert found == [True] * mixed + [False] * (epochs - mixed)


def test_two_hundred_and_twenty_epochs_are_mixed_where_that_share_is_stated():
    """220 / 300 * 300 is 219.99999999999997."""
    config = TrainConfig(batch_size=20, mix_until=220 / 300, mixup=10.0, cutmix=0.0)
    for epoch, mixed in ((220, True), (221, False)):
        assert any((b[:, -3:].amax(1) < 0.999).any() for b in batches(config, epoch)) == mixed


def test_the_fill_of_randaugment_is_black_or_the_mean_colour(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "augment", lambda images, *policy: seen.append(policy[:-1]) or images)
    for fill in ("black", "mean"):
        config = TrainConfig(
            batch_size=6, randaugment_fill=fill, randaugment_magnitude=7, randaugment_prob=0.25
        )
        batches(config, 1)
    assert seen[0] == ("pad", 2, 7, 0.25, None)
    assert seen[1][:4] == ("pad", 2, 7, 0.25)
    assert seen[1][4] == pytest.approx((0.4 * 255, 0.45 * 255, 0.5 * 255))


def test_epoch_randomness_depends_on_seed_and_epoch_alone():
    """In any order, whatever the global stream is at; and run s + 1 is not run s an epoch later."""
    pairs = [(0, 1), (0, 2), (1, 1), (1, 0), (7, 3)]
    first, again = {}, {}
    for i, (found, order) in enumerate([(first, pairs), (again, pairs[::-1])]):
        torch.manual_seed(i)
        before = torch.get_rng_state()
        for seed, epoch in order:
            found[seed, epoch] = torch.stack(batches(TrainConfig(batch_size=10, seed=seed), epoch))
        assert torch.equal(torch.get_rng_state(), before)
    assert (
        difference({str(k): v for k, v in first.items()}, {str(k): v for k, v in again.items()})
        is None
    )
    for a, b in itertools.combinations(pairs, 2):
        assert not torch.equal(first[a], first[b]), (a, b)


def test_dropout_draws_anew_in_every_epoch_and_for_every_seed(monkeypatch):
    """Its stream is the global one; before the first step it is a function of (seed, epoch)."""
    seen = spy_on_steps(monkeypatch, lambda *_: torch.get_rng_state())
    for i, seed in enumerate((0, 1, 0)):
        torch.manual_seed(i)
        assert run("--seed", seed, out=i) == 0
    starts = [state.numpy().tobytes() for state in seen[::5]]  # of epochs 1 and 2, three times
    assert starts[:2] == starts[4:] and len(set(starts)) == 4


# ---- 6 The checkpoint ----


def test_a_checkpoint_rebuilds_the_same_model_without_any_flags(monkeypatch):
    """Plain data: both configs, classes, statistics. The same logits, to the bit."""
    models = {}
    real = train.finish
    monkeypatch.setattr(
        train, "finish", lambda run: (models.update(last=run.state.model), real(run))
    )
    assert run("--pool", "mean", "--mlp-ratio", 3, "--heads", 4) == 0
    raw = torch.load("out/last.pt", weights_only=True)
    assert (raw["classes"], raw["mean"], raw["std"]) == (DATASET.classes, DATASET.mean, DATASET.std)
    assert (
        raw["vit"]["num_classes"] == 3
        and raw["vit"]["pool"] == "mean"
        and raw["train"]["lr"] == 0.01
    )
    model = evaluate.build_model(evaluate.load_checkpoint("out/last.pt"))
    images, _ = small_batch(0)
    assert not model.training
    assert torch.equal(model(images.float()), models["last"].eval()(images.float()))


def test_a_checkpoint_says_where_its_numbers_come_from(monkeypatch):
    """Commit, software, hardware, as text: weights_only refuses torch.__version__ itself."""
    monkeypatch.setattr(train, "versions", VERSIONS)
    assert run() == 0
    facts = torch.load("out/last.pt", weights_only=True)["versions"]
    assert facts["torch"] == torch.__version__ and facts["device"].startswith("cpu")
    assert re.fullmatch("unknown|[0-9a-f]{7,}(-dirty)?", facts["commit"])


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert VERSIONS(torch.device("cpu"))["commit"] == "unknown"


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), Kill(), ValueError("x")]
)
def test_a_failed_save_leaves_the_previous_checkpoint_intact(failure):
    """Whatever the writer raises, the target is the old file and nothing lies beside it."""

    def half(obj, file):
        file.write(b"half")
        raise failure

    data.save_atomically({"a": 1}, "a.pt")
    before = tree()
    with pytest.raises(type(failure)):
        data.save_atomically({"a": 2}, "a.pt", write=half)
    with pytest.raises(Exception):
        data.save_atomically({"a": lambda: None}, "a.pt")  # cannot be pickled
    assert tree() == before


def test_a_save_is_on_the_disk_before_it_takes_the_place_of_the_old_file(monkeypatch):
    """fsync, then replace, in one folder: else a power cut could leave an empty file."""
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def spy(*args, name=name, real=real):
            steps.append((name, *args))
            return real(*args)

        monkeypatch.setattr(os, name, spy)
    os.makedirs("d")
    data.save_atomically("text", "d/a", write=lambda text, file: file.write(text.encode()))
    assert [step[0] for step in steps] == ["fsync", "replace"]
    assert Path(steps[1][1]).parent == Path("d") and steps[1][2] == "d/a"


@pytest.mark.parametrize("file", ["best.pt", "last.pt", "log.csv"])
def test_a_full_disk_ends_the_run_with_one_line_and_loses_nothing(file, monkeypatch, capsys):
    """The previous files are whole, the message ends in the command that continues, exit code 2."""
    assert run("--max-minutes", 1e-9, "--epochs", 3) == 0
    before = tree()
    capsys.readouterr()
    real = os.replace

    def full(source, target):
        if target.endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(
            train, "validate", lambda run, *_: (1.0, run.epoch)
        )  # every epoch is the best
        assert run("--resume", "--epochs", 3) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and line.endswith(" --resume")
    assert tree()[f"out/{file}"] == before[f"out/{file}"] and not list(Path("out").glob("*.tmp"))
    assert run("--resume", "--epochs", 3) == 0


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("x: can't allocate memory")],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_is_one_line_that_says_what_is_kept(error, monkeypatch, capsys):
    """In the eighth step, say, because another program has taken the GPU's memory."""

    def raise_it(*_):
        raise error

    with monkeypatch.context() as patch:
        on_call(patch, train, "train_step", 8, raise_it)
        assert run() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory") and "--batch-size" in line
    assert line.endswith("out/last.pt holds epoch 1 of 2")
    assert run("--resume") == 0


def test_any_other_failure_of_torch_keeps_its_traceback(monkeypatch):
    """A bug is not the user's to mend, even if its text speaks of memory."""

    def raise_it(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    on_call(monkeypatch, train, "train_step", 8, raise_it)
    with pytest.raises(RuntimeError, match="illegal"):
        run()


def flip_a_bit(path):
    """One bit, inside the data of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        member = max(
            archive.infolist(), key=lambda info: info.file_size * ("/data/" in info.filename)
        )
    content = bytearray(path.read_bytes())
    start = content.index(member.filename.encode()) + len(member.filename)
    content[start + 64 + member.file_size // 2] ^= 1
    path.write_bytes(content)


class Payload:
    """Unpickled by a careless reader, it writes a file."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def png_bytes():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def zip_bytes():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "hello")
    return file.getvalue()


def torch_bytes(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def edited(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


DAMAGE = {  # what is done to a good checkpoint, given its path
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a flipped bit": flip_a_bit,
    "text": lambda path: path.write_text("epoch 3 was a good one\n"),
    "html": lambda path: path.write_text("<!DOCTYPE html><html>Not Found</html>"),
    "a picture": lambda path: path.write_bytes(png_bytes()),
    "a zip": lambda path: path.write_bytes(zip_bytes()),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Payload())),
    "malicious": lambda path: path.write_bytes(
        torch_bytes({"format": evaluate.FORMAT, "x": Payload()})
    ),
    "foreign": lambda path: path.write_bytes(torch_bytes({"state_dict": {}})),
    "a list": lambda path: path.write_bytes(torch_bytes([1, 2])),
    "another version": lambda path: edited(
        path, lambda c: c.update(format="vit-cifar10 checkpoint 0")
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another network": lambda path: edited(path, lambda c: c["vit"].update(dim=16)),
    "a part missing": lambda path: edited(path, lambda c: c.pop("model")),
}


@pytest.mark.parametrize("reader", ["train.py --resume", "evaluate.py"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_named_as_such(damage, reader, plain, capsys, here):
    """One line with the path; the file stays as it is; no code in it runs."""
    shutil.copytree(plain, "out")
    path = here / "out" / "last.pt"
    DAMAGE[damage](path)
    before = tree()
    code = run("--resume") if reader.startswith("train") else evaluate.main([str(path)])
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("error: ") and str(Path("out") / "last.pt") in line
    assert "weights_only" not in line  # torch's own message advises to switch the protection off
    assert tree() == before and not Path("hacked").exists()


def test_best_is_no_substitute_for_last(plain, capsys):
    """A best.pt renamed to last.pt holds no optimizer: one line, not a KeyError."""
    os.makedirs("out")
    shutil.copy(plain / "best.pt", "out/last.pt")
    assert run("--resume") == 2
    assert "last.pt" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(capsys):
    assert evaluate.main(["out/best.pt"]) == 2
    assert capsys.readouterr().err == "error: no checkpoint at out/best.pt\n"


def test_the_payload_of_these_tests_would_have_worked():
    """Else the absence of its trace would prove nothing."""
    pickle.loads(pickle.dumps(Payload()))
    assert Path("hacked").exists()


def test_a_flipped_bit_passes_torch_load(plain, here):
    """pytorch/pytorch#126952: this is why every byte is checked against its CRC."""
    shutil.copy(plain / "last.pt", "last.pt")
    flip_a_bit(here / "last.pt")
    assert difference(contents("last.pt"), contents(plain / "last.pt"))


def script(monkeypatch, accuracies):
    """Let the epochs find these accuracies; returns a list that collects their weights."""
    real, kept = train.validate_epoch, []
    monkeypatch.setattr(train, "validate", lambda run, *_: (1.0, accuracies[run.epoch]))
    monkeypatch.setattr(
        train,
        "validate_epoch",
        lambda run, row: (kept.append(weights(run.state.model)), real(run, row)),
    )
    return kept


@pytest.mark.parametrize("save_every", [1, 4])
def test_best_holds_the_weights_of_the_first_epoch_with_the_highest_accuracy(
    save_every, monkeypatch
):
    """Not of the last one with it, and not the weights at the time of saving."""
    kept = script(monkeypatch, [0.2, 0.5, 0.5, 0.1])
    assert run("--epochs", 4, "--save-every", save_every) == 0
    best = torch.load("out/best.pt", weights_only=True)
    assert best["epoch"] == 2 and best["best"] == {"epoch": 2, "accuracy": 0.5}
    assert difference(dict(best["model"]), kept[1]) is None


def test_unmixed_ties_and_unvalidated_epochs_are_no_candidates(monkeypatch):
    """With --eval-every 2 of 5 epochs: 2, 4 and, being the last, 5."""
    script(monkeypatch, [0.9, 0.2, 0.9, 0.3, 0.3])
    assert run("--epochs", 5, "--eval-every", 2) == 0
    assert [row["val_accuracy"] for row in read_csv()] == ["", "0.2", "", "0.3", "0.3"]
    assert torch.load("out/best.pt", weights_only=True)["best"] == {"epoch": 4, "accuracy": 0.3}


# ---- 7 Resume ----


def full(*flags, out="out"):
    return run(*FULL, *flags, out=out)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four epochs in one go, all switched on, a step skipped in each: last.pt, lines of the log."""
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, steps=(1,))
        assert full(out=out) == 0
    return contents(out / "last.pt"), (out / "log.csv").read_text().count("\n")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The same run, stopped twice: after epoch 1 and after epoch 2."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, steps=(1,))
        for resume in ([], ["--resume"]):
            assert full("--max-minutes", 1e-9, *resume, out=out) == 0
    return out


def test_training_stopped_and_resumed_equals_training_straight_through(straight, half, monkeypatch):
    """1 + 1 + 2 epochs against 4: every tensor, number and row of the log, to the bit."""
    expected, rows = straight
    assert contents(half / "last.pt")["/epoch"] == 2
    assert expected["/scaler/scale"] != 2.0**10 and expected["/scheduler/last_epoch"] == 16
    assert {"/ema/head.bias", "/optimizer/state/0/exp_avg", "/history/3/skipped_steps"} <= set(
        expected
    )
    shutil.copytree(half, "out")
    poison(monkeypatch, steps=(1,))
    assert full("--resume") == 0
    assert difference(contents("out/last.pt"), expected) is None
    assert Path("out/log.csv").read_text().count("\n") == rows == 1 + 4


@pytest.mark.parametrize(
    "piece", ["model", "ema", "optimizer", "scheduler", "scaler", "randomness"]
)
def test_leaving_any_piece_out_of_the_resume_is_noticed(piece, straight, half, monkeypatch):
    """The negative controls: with this piece as fresh as in a new run, the comparison must fail."""
    unpack, epoch_seed = train.unpack, train.epoch_seed

    def forgetful(checkpoint, state):
        fresh = copy.deepcopy(train.pack(state))
        unpack({**checkpoint, piece: fresh.get(piece)}, state)

    monkeypatch.setattr(train, "unpack", forgetful)
    if piece == "randomness":  # the streams begin again with the first epoch's
        monkeypatch.setattr(train, "epoch_seed", lambda seed, epoch: epoch_seed(seed, epoch - 2))
    shutil.copytree(half, "out")
    poison(monkeypatch, steps=(1,))
    assert full("--resume") == 0
    assert difference(contents("out/last.pt"), straight[0])


@pytest.mark.parametrize(
    "owner, name", [(train, "train_step"), (data, "save_atomically"), (os, "replace")]
)
@pytest.mark.parametrize("number", [2, 5, 6])
def test_a_run_that_dies_anywhere_and_is_resumed_ends_in_the_same_bits(
    owner, name, number, monkeypatch, plain
):
    """In a step, before a file is written (best.pt, last.pt, log.csv), before it is moved."""
    with monkeypatch.context() as patch:
        on_call(patch, owner, name, number, kill)
        with pytest.raises(Kill):
            run()
    assert run("--resume") == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None
    assert difference(contents("out/best.pt"), contents(plain / "best.pt")) is None
    assert [row["epoch"] for row in read_csv()] == ["1", "2"]


@pytest.mark.parametrize("killed_in, holds", [(2, None), (4, 3), (5, 3)])
def test_rare_saves_lose_epochs_and_no_bits(killed_in, holds, monkeypatch):
    """--save-every 3 of 5 epochs: files after 3 and, being the last, 5."""
    flags = ("--save-every", 3, "--epochs", 5)
    assert run(*flags, out="straight") == 0
    with monkeypatch.context() as patch:
        on_call(patch, train, "train_step", 5 * killed_in - 2, kill)
        with pytest.raises(Kill):
            run(*flags)
    assert Path("out/last.pt").exists() == bool(holds)
    assert not holds or torch.load("out/last.pt", weights_only=True)["epoch"] == holds
    assert run(*flags, "--resume") == 0
    assert torch.load("out/last.pt", weights_only=True)["epoch"] == 5
    assert difference(contents("out/last.pt"), contents("straight/last.pt")) is None


def test_on_a_gpu_ten_seconds_lie_between_two_saves_and_the_last_epoch_is_saved_all_the_same(
    monkeypatch,
):
    """Epochs of 3 seconds: after 1, 5, 9, and 10, the last. On a CPU every epoch is saved."""
    assert [train.save_pause(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [0, 10, 10]
    clock, saved = [0.0], []
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    epoch, save = train.train_epoch, train.save

    def slow_epoch(*args, **kwargs):
        clock[0] += 3
        return epoch(*args, **kwargs)

    monkeypatch.setattr(train, "train_epoch", slow_epoch)
    monkeypatch.setattr(train, "save", lambda run: saved.append(run.epoch) or save(run))
    assert run("--epochs", 10, out="cpu") == 0 and saved == list(range(1, 11))
    saved.clear()
    monkeypatch.setattr(train, "save_pause", lambda device: 10)
    assert run("--epochs", 10, out="gpu") == 0 and saved == [1, 5, 9, 10]
    saved.clear()
    assert run("--epochs", 10, "--save-every", 2, out="both") == 0 and saved == [2, 6, 10]
    assert difference(outcome("gpu/last.pt"), outcome("cpu/last.pt")) is None


def test_a_run_stopped_before_its_first_validation_resumes_to_the_same_bits():
    """There is no best epoch yet, and no best.pt."""
    flags = ("--eval-every", 3, "--epochs", 4)
    assert run(*flags, out="straight") == 0
    assert run(*flags, "--max-minutes", 1e-9) == 0
    assert not Path("out/best.pt").exists()
    assert run(*flags, "--resume") == 0
    assert difference(contents("out/last.pt"), contents("straight/last.pt")) is None


@pytest.mark.parametrize("first, then", [("float32", "float16"), ("float16", "float32")])
def test_a_run_may_move_to_a_device_of_another_dtype(first, then, monkeypatch):
    """Begun on an Ampere GPU, finished on a T4: the loss scale starts anew, the run goes on."""
    monkeypatch.setattr(train, "pick_dtype", lambda *_: getattr(torch, first))
    assert run("--max-minutes", 1e-9) == 0
    monkeypatch.setattr(train, "pick_dtype", lambda *_: getattr(torch, then))
    assert run("--resume") == 0
    assert bool(evaluate.load_checkpoint("out/last.pt")["scaler"]) == (then == "float16")


@pytest.mark.parametrize("left", ["another epoch's", "torn", "none", "a list"])
def test_looking_at_the_test_set_halfway_does_not_replace_the_last_look(left):
    """metrics.json counts as the end only if it is whole and of the best epoch."""
    assert run() == 0
    final = Path("out/metrics.json").read_text()
    other = json.dumps({**json.loads(final), "epoch": 99})
    texts = {"torn": final[:40], "none": "", "a list": "[]"}
    Path("out/metrics.json").write_text(texts.get(left, other))
    assert run("--resume") == 0
    assert Path("out/metrics.json").read_text() == final


def test_looking_at_the_test_set_on_the_way_does_not_replace_the_last_look(monkeypatch, capsys):
    """Even if the epoch that was looked at stays the best: its curves ended there."""
    script(monkeypatch, [0.9, 0.8])
    assert run("--max-minutes", 1e-9) == 0
    assert evaluate.main(["out/best.pt", "--device", "cpu"]) == 0
    assert json.loads(Path("out/metrics.json").read_text())["epochs_trained"] == 1
    for told in ("now, once, the test set", "complete, and so is its evaluation"):
        capsys.readouterr()
        assert run("--resume") == 0
        assert told in capsys.readouterr().out


def emptied(best):
    best.write_bytes(b"")


def of_another_seed(best):
    assert run("--seed", 1, out="other") == 0
    shutil.copy("other/best.pt", best)


def of_another_epoch(best):
    """Of the same recipe, and of an accuracy this run never saw."""
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["best"]["accuracy"] += 0.1
    torch.save(checkpoint, best)


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("spoil", [emptied, of_another_seed, of_another_epoch])
def test_a_best_that_is_not_of_the_run_is_refused_at_once(spoil, is_finished, capsys):
    """Not after the last epoch, and not evaluated in place of the run's own."""
    assert run(*([] if is_finished else ["--max-minutes", 1e-9])) == 0
    Path("out/metrics.json").unlink(missing_ok=True)
    spoil(Path("out/best.pt"))
    before = tree()
    capsys.readouterr()
    assert run("--resume") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "best.pt" in line and tree() == before


def test_a_best_that_is_gone_costs_no_more_than_the_best_so_far(monkeypatch, capsys):
    """The run goes on, and chooses among what is left; when nothing is left, it says so."""
    script(monkeypatch, [0.9, 0.5, 0.6])
    assert run("--epochs", 3, "--max-minutes", 1e-9) == 0
    os.remove("out/best.pt")
    assert run("--epochs", 3, "--resume") == 0
    told = capsys.readouterr().out
    assert "warning: out/best.pt is gone" in told and "best epoch 3, validation accuracy" in told
    os.remove("out/best.pt")
    assert run("--epochs", 3, "--resume") == 2
    told = capsys.readouterr()
    assert told.err == "error: no checkpoint at out/best.pt\n" and "warning" not in told.out


def test_a_best_that_is_ahead_of_the_last_is_the_best(monkeypatch, capsys):
    """A kill came between the two, and on a GPU the repeated epoch may turn out worse."""
    script(monkeypatch, [0.5, 0.6, 0.1])
    assert run("--epochs", 3, "--max-minutes", 1e-9) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_log", kill)
        patch.setattr(train, "pack", lambda state, **facts: kill() if facts else PACK(state))
        with pytest.raises(Kill):
            run("--epochs", 3, "--resume")
    assert torch.load("out/last.pt", weights_only=True)["epoch"] == 1
    script(monkeypatch, [0.5, 0.45, 0.1])
    assert run("--epochs", 3, "--resume") == 0
    assert "best epoch 2, validation accuracy 60.00%" in capsys.readouterr().out
    for name in ("best", "last"):
        best = torch.load(f"out/{name}.pt", weights_only=True)["best"]
        assert best == {"epoch": 2, "accuracy": 0.6}


def test_a_best_of_an_earlier_sitting_is_of_the_run(monkeypatch):
    """Though it was saved before the data were moved and --save-every was changed."""
    script(monkeypatch, [0.9, 0.8, 0.7])
    for flags in ([], ["--resume", "--save-every", 2], ["--resume", "--save-every", 1]):
        assert run("--epochs", 3, "--max-minutes", 1e-9, *flags) == 0
    assert [row["epoch"] for row in read_csv()] == ["1", "2", "3"]


def test_a_best_alone_starts_its_own_run_again_and_no_other(capsys):
    """As a kill in the first save leaves it."""
    assert run("--epochs", 1, "--seed", 5) == 0
    for name in ("last.pt", "metrics.json", "log.csv"):
        os.remove(f"out/{name}")
    before = Path("out/best.pt").read_bytes()
    assert run("--resume", "--epochs", 1, "--seed", 9) == 2
    assert "--seed 9 contradicts the run in out" in capsys.readouterr().err
    assert Path("out/best.pt").read_bytes() == before
    assert train.main(["--resume"]) == 0
    assert torch.load("out/last.pt", weights_only=True)["train"]["seed"] == 5


def test_metrics_are_written_last_so_that_a_kill_repeats_the_evaluation(monkeypatch):
    def kill(*_):
        raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(evaluate, "plot_positions", kill)
        run()
    assert not Path("out/metrics.json").exists()
    assert run("--resume") == 0 and Path("out/metrics.json").exists()


def test_each_process_draws_dropout_masks_of_its_own(monkeypatch):
    """torch's CPU generator reads the low 32 bits of its seed: they must differ between ranks."""
    seeds = set()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.add(seed % 2**32))
    monkeypatch.setattr(train, "epoch_batches", lambda *_: [])
    config = TrainConfig(batch_size=8)
    state = SimpleNamespace(scheduler=SimpleNamespace(last_epoch=0), model=nn.Identity())
    device = torch.device("cpu")
    for rank in range(8):
        for epoch in range(1, 4):
            r = train.Run(config, ViTConfig(), DATASET, device, rank, 8, (), (), state)
            with pytest.raises(RuntimeError):  # no batches, no losses
                train.train_epoch(r, epoch)
    assert len(seeds) == 8 * 3


def test_the_hundred_percent_of_mfu_is_the_peak_of_all_processes_together(monkeypatch):
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(train.dist, name, lambda *_, **__: None)
    preset, flags = train.parse(TINY)
    assert [train.prepare(preset, flags, 0, world).peak for world in (1, 4)] == [1e12, 4e12]


def test_best_of_an_earlier_sitting_survives(monkeypatch):
    """The best so far and its file are carried on; a worse epoch does not replace them."""
    script(monkeypatch, [0.9, 0.8, 0.7])
    assert run("--epochs", 3, "--max-minutes", 1e-9) == 0
    before = Path("out/best.pt").read_bytes()
    assert run("--epochs", 3, "--resume") == 0
    assert Path("out/best.pt").read_bytes() == before
    assert torch.load("out/last.pt", weights_only=True)["best"] == {"epoch": 1, "accuracy": 0.9}


def test_evaluating_in_between_changes_nothing():
    """Validation draws no random number and leaves the model in train mode."""
    for every in (1, 4):
        assert run(*FULL, "--eval-every", every, out=every) == 0
    a, b = (contents(f"{every}/last.pt") for every in (1, 4))
    kept = {k for k in a if re.match("/(model|ema|optimizer|scaler|scheduler)/", k)}
    assert len(kept) > 50
    assert difference({k: a[k] for k in kept}, {k: b[k] for k in kept}) is None


@pytest.mark.parametrize("name", [*OTHER, "dataset", "num_classes", "deterministic"])
def test_resume_refuses_flags_that_contradict_the_saved_recipe(name, plain, capsys):
    """Each field in turn, by its flag; the run stays as it was."""
    shutil.copytree(plain, "out")
    before = tree()
    value = {"dataset": "cifar10", "num_classes": 4, "deterministic": None}.get(name) or OTHER.get(
        name
    )
    assert run("--resume", flag(name), *([] if name == "deterministic" else [value])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{flag(name)} " in line and "contradicts the run in out" in line
    assert tree() == before


def test_resume_takes_the_recipe_from_the_run_and_needs_no_flags(plain, monkeypatch):
    """A bare --resume ends like the run that was given every flag."""
    assert run("--max-minutes", 1e-9) == 0
    assert train.main(["--resume"]) == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


def test_repeating_the_flags_of_the_run_is_no_contradiction(plain):
    """The same command with --resume behind it is the command that continues."""
    assert run("--max-minutes", 1e-9) == run("--resume") == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


def test_a_flag_that_fits_the_run_need_not_fit_the_defaults():
    """One that only repeats the run: --dim 8 cannot have the three heads of the default."""
    own = "--batch-size 1 --mixup 0 --cutmix 0 --image-size 6 --patch-size 3".split()
    assert run(*own, "--max-minutes", 1e-9) == 0
    assert train.main("--resume --dim 8 --batch-size 1 --image-size 6".split()) == 0
    assert [row["epoch"] for row in read_csv()] == ["1", "2"]


def test_a_contradiction_of_the_preset_is_not_blamed_on_a_flag(plain, capsys):
    shutil.copytree(plain, "out")
    assert train.main(["--resume", "--preset", "demo"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--val-size 1000 of the --preset contradicts the run in out, which has 20" in line


def test_resume_minds_only_the_flags_that_were_typed(plain):
    """--batch-size alone scales the rate of a new run; of an old one the rate is known."""
    assert run("--max-minutes", 1e-9) == 0
    assert train.main(["--resume", "--batch-size", "8"]) == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


def test_what_belongs_to_the_sitting_may_change_on_resume(plain, monkeypatch):
    """Where the data lie, how often to save, on what to compute."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: seen.append("compiled") or call)
    assert run("--max-minutes", 1e-9) == 0
    monkeypatch.setattr(data, "load", lambda *args: seen.append(args[1]) or DATASET)
    changes = (
        "--max-minutes 60 --save-every 2 --data-dir moved --device cpu --compile --download-url u"
    )
    assert run("--resume", *changes.split()) == 0
    assert seen == ["moved", "compiled", "compiled"]  # both blocks
    ours, theirs = (contents(f"{out}/last.pt") for out in ("out", plain))
    changed = {k for k in ours if difference({k: ours[k]}, {k: theirs.get(k)})}
    assert changed == {f"/train/{k}" for k in ("save_every", "data_dir", "compile", "download_url")}


@pytest.mark.parametrize(
    "changed",
    [
        make_dataset(n=61),
        replace(DATASET, mean=(0.4, 0.45, 0.51)),
        replace(DATASET, std=(0.2, 0.25, 0.31)),
        replace(DATASET, classes=["cat", "dog", "elk"]),
        make_dataset(("cat", "dog", "eel", "fox")),
        replace(DATASET, train_images=DATASET.train_images.flip(0)),
        replace(DATASET, train_labels=DATASET.train_labels.flip(0)),
    ],
    ids=["images", "mean", "std", "names", "classes", "order", "labels"],
)
def test_resume_refuses_data_that_are_not_those_of_the_run(changed, monkeypatch, capsys):
    """With other pictures, the split would leak validation images into training."""
    assert run("--max-minutes", 1e-9) == 0
    before = tree()
    monkeypatch.setattr(data, "load", lambda *_: changed)
    assert run("--resume") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "not those the run in out was trained on" in line or "3, but the dataset has 4" in line
    assert tree() == before


def test_resume_refuses_a_recipe_with_a_field_it_does_not_know(plain, capsys):
    """A checkpoint of a later version of train.py: one line that says so."""
    shutil.copytree(plain, "out")
    edited("out/last.pt", lambda checkpoint: checkpoint["train"].update(warmup=3, angle=1))
    before = tree()
    assert run("--resume") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "out was written by another version: unknown angle, warmup" in line
    assert tree() == before


@pytest.mark.parametrize(
    "left",
    [["last.pt"], ["best.pt"], ["metrics.json"], ["log.csv"], ["last.pt", "best.pt", "log.csv"]],
)
def test_an_existing_run_is_never_overwritten_unasked(left, plain, capsys):
    """A second start into the same folder names the two ways on.

    (A metrics.json that is left over would pass for the new run's look at the test set.)
    """
    os.makedirs("out")
    for name in left:
        shutil.copy(plain / name, "out")
    before = tree()
    assert run() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--resume" in line and "--out" in line and "already holds a run" in line
    assert tree() == before


def test_resume_into_a_folder_without_a_run_starts_one(plain):
    """So one command both starts and continues: a cell for Colab."""
    assert run("--resume") == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


@pytest.mark.parametrize("accuracies", [[0.1, 0.9], [0.9, 0.1]])
def test_what_is_left_of_a_run_without_its_last_is_not_overwritten(accuracies, monkeypatch, capsys):
    """After the first save this is no kill's work: last.pt was lost, and best.pt is left."""
    script(monkeypatch, accuracies)
    assert run() == 0
    for lost, left in (("last", "best.pt"), ("best", "metrics.json")):
        os.remove(f"out/{lost}.pt")
        before = tree()
        assert run("--resume") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"{left} but no last.pt" in line and tree() == before


def test_a_finished_run_is_not_evaluated_again(plain, capsys):
    """The test set is looked at once in the life of a run."""
    shutil.copytree(plain, "out")
    before = tree()
    assert run("--resume") == 0
    assert "complete" in capsys.readouterr().out and tree() == before


def test_a_run_killed_before_its_evaluation_is_evaluated_on_resume(plain, monkeypatch):
    with monkeypatch.context() as patch:
        on_call(patch, evaluate, "evaluate", 1, kill)
        with pytest.raises(Kill):
            run()
    assert not Path("out/metrics.json").exists()
    assert run("--resume") == 0
    assert Path("out/metrics.json").read_bytes() == (plain / "metrics.json").read_bytes()


# ---- 8 Ending well ----


def continuing(line):
    """The command in "continue with: ...", as arguments of main()."""
    words = shlex.split(line.removeprefix("continue with: "))
    assert words[0] == "python" and words[1].endswith("train.py")
    assert words.count("--resume") == 1
    return words[2:]


@pytest.mark.parametrize("minutes", [1, 0.9])
def test_max_minutes_ends_at_an_epoch_boundary_before_the_time_is_up(minutes, monkeypatch, capsys):
    """Epochs of 10 s by a false clock: a sixth, with a tenth to spare, would end at 61 s. A fifth,
    with no more than that to spare, ends within 54 s."""
    clock = {"now": 1000.0}
    real = train.train_epoch

    def train_epoch(*args, **kwargs):
        clock["now"] += 10
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    false = SimpleNamespace(monotonic=lambda: clock["now"], perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "time", false)
    assert run("--epochs", 8, "--max-minutes", minutes, "--save-every", 100) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "out of time: out/last.pt holds epoch 5 of 8"
    assert [row["seconds"] for row in read_csv()] == ["10.0"] * 5
    assert train.main([*continuing(second), "--max-minutes", "60"]) == 0
    assert len(read_csv()) == 8


def test_max_minutes_counts_the_saves_too(monkeypatch):
    """Epochs of 10 s and saves of 6 s by a false clock: three are done after 48 s, and a fourth
    would be after 64 s."""
    clock, saves = {"now": 1000.0}, []

    def pass_by(seconds, real):
        def call(*args, **kwargs):
            clock["now"] += seconds
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(train, "train_epoch", pass_by(10, train.train_epoch))
    monkeypatch.setattr(train, "save", pass_by(6, lambda run: saves.append(clock["now"])))
    false = SimpleNamespace(monotonic=lambda: clock["now"], perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "time", false)
    assert run("--epochs", 8, "--max-minutes", 1) == 0
    assert saves == [1016, 1032, 1048]


def test_a_run_whose_time_is_out_with_its_last_epoch_is_complete(capsys):
    """There is nothing to continue: it is evaluated."""
    assert run("--epochs", 1, "--max-minutes", 1e-9) == 0
    assert Path("out/metrics.json").exists() and "continue" not in capsys.readouterr().out


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_two_lines(number, code, monkeypatch, capsys, plain):
    """What is on the disk, and the command that continues; the old handlers are put back."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        on_call(patch, train, "train_step", 8, lambda *_: signal.raise_signal(number))
        assert run("--seed", 0) == code
    assert signal.getsignal(number) == before
    out, err = capsys.readouterr()
    *_, first, second = out.splitlines()
    assert first == f"stopped by {number.name}: out/last.pt holds epoch 1 of 2" and not err
    assert train.main(continuing(second)) == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


def test_a_signal_before_the_first_save_says_so(monkeypatch, capsys):
    on_call(monkeypatch, train, "train_step", 2, lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(out="my run") == 130
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "stopped by SIGINT: no epoch is saved yet"
    assert "--out 'my run'" in second and continuing(second)[-1] == "--resume"


def test_the_second_of_two_signals_does_not_interrupt_the_farewell():
    """torchrun sends SIGTERM to processes that Ctrl-C has reached already."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(train.Stopped):
            train.stop(signal.SIGINT, None)
        assert {signal.getsignal(n) for n in old} == {signal.SIG_IGN}
    finally:
        for n, handler in old.items():
            signal.signal(n, handler)


def test_the_command_that_continues_names_torchrun_when_it_was_used():
    assert train.command(["--out", "a b", "--resume"], 1) == "python train.py --out 'a b' --resume"
    assert train.command([], 4) == "torchrun --nproc_per_node=4 train.py --resume"


# ---- 9 The log ----

COLUMNS = """epoch lr train_loss val_loss val_accuracy ema_accuracy train_accuracy grad_norm
    skipped_steps images_per_second mfu seconds""".split()


def test_the_log_is_a_table_of_the_numbers_of_every_epoch(plain):
    """Fractions and seconds, in full precision; an empty cell is a number that was not measured."""
    rows = read_csv(plain / "log.csv")
    history = torch.load(plain / "last.pt", weights_only=True)["history"]
    assert list(rows[0]) == COLUMNS == list(history[0])
    for row, expected in zip(rows, history, strict=True):
        assert {k: float(v) if v else None for k, v in row.items()} == expected
    assert rows[0]["ema_accuracy"] == "" and evaluate.read_log(plain / "log.csv") == history


def test_the_log_of_an_epoch_is_the_mean_over_its_steps(monkeypatch):
    """Loss and gradient norm, as train_step returned them."""
    real, seen = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *args: seen.append(real(*args)) or seen[-1])
    assert run() == 0
    for i, row in enumerate(read_csv()):
        loss, norm = torch.tensor(seen[5 * i : 5 * i + 5], dtype=torch.float64).mean(0).tolist()
        assert float(row["train_loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-6)
        assert row["skipped_steps"] == "0"


def test_throughput_and_mfu_follow_from_the_clock(plain):
    """MFU = images/s x 3 forward passes / measured peak (1e12 here)."""
    # P = 4, N = 5, D = 8, two blocks, K = 3, a multiply-add is 2
    forward = 2 * (4 * 48 * 8 + 2 * (5 * (4 * 64 + 2 * 8 * 32) + 2 * 25 * 8) + 8 * 3)
    for row in read_csv(plain / "log.csv"):
        speed = float(row["images_per_second"])
        assert float(row["mfu"]) == pytest.approx(speed * 3 * forward / 1e12, rel=1e-9)
        assert 40 / speed < float(row["seconds"])


def test_the_throughput_counts_the_augmentation(monkeypatch):
    """100 s of it, by a false clock that stands still otherwise: 40 images in 100 s."""
    clock, augment = [0.0], data.augment

    def slow(*args):
        clock[0] += 100
        return augment(*args)

    monkeypatch.setattr(data, "augment", slow)
    false = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: clock[0])
    monkeypatch.setattr(train, "time", false)
    assert run() == 0
    assert [float(row["images_per_second"]) for row in read_csv()] == [0.4, 0.4]


def test_the_peak_is_that_of_the_fastest_of_five_products(monkeypatch):
    """2 n^3 operations in the 2 seconds of the second one; n is smaller where a CPU emulates."""
    for dtype, n in ((torch.float32, 1024), (torch.bfloat16, 1024), (torch.float16, 256)):
        ticks = iter([0, 4, 10, 12, 20, 23, 30, 33, 40, 45])
        monkeypatch.setattr(train.time, "perf_counter", lambda ticks=ticks: next(ticks))
        with FlopCounterMode(display=False) as counter:
            assert MEASURE_PEAK(torch.device("cpu"), dtype) == 2 * n**3 / 2
        assert counter.get_total_flops() == 5 * 2 * n**3


def test_the_accuracies_in_the_log_are_those_of_clean_images():
    """On mixed batches they would mean nothing. Each is that of its own weights and images."""
    flags = "--epochs 4 --mixup 0 --cutmix 0 --lr 0.03 --pct-start 0.9 --ema-decay 0.99"
    pairs = set(itertools.combinations(("train_accuracy", "val_accuracy", "ema_accuracy"), 2))
    for seed in range(2, 6):  # equal numbers would prove nothing, so not one run but four
        assert run(*flags.split(), "--seed", seed, out=f"out{seed}") == 0
        checkpoint = evaluate.load_checkpoint(f"out{seed}/last.pt")
        row, found = checkpoint["history"][-1], {}
        train_index, val_index = data.split(60, 20, seed)
        for name, kind, index in (
            ("train_accuracy", "model", train_index),
            ("val_accuracy", "model", val_index),
            ("ema_accuracy", "ema", val_index),
        ):
            model = evaluate.build_model({**checkpoint, "ema": checkpoint[kind]})
            x = data.normalize(DATASET.train_images[index], DATASET.mean, DATASET.std)
            correct = model(x).argmax(1) == DATASET.train_labels[index]
            found[name] = pytest.approx(correct.double().mean().item())
            assert row[name] == found[name]
        pairs = {(a, b) for a, b in pairs if row[a] == row[b]}
    assert not pairs


def test_the_screen_shows_aligned_columns_and_no_bar(capsys):
    """Five facts, then one line an epoch as wide as the header; a bar would flood a notebook."""
    assert run("--ema-decay", 0.9, "--seed", 3) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    head = [line.split()[0] for line in lines[:6]]
    assert head == ["model", "data", "run", "machine", "start", "epoch"] and not err
    assert "40 training, 20 validation, 30 test images, 3 classes" in lines[1]
    assert "2 epochs, 10 steps of 8 images" in lines[2] and "seed 3" in lines[2]
    assert f"ln(3) = {math.log(3):.4f}" in lines[4]
    assert float(re.search(r"loss (\d\.\d+)", lines[4])[1]) == pytest.approx(math.log(3), abs=0.05)
    assert [line.split()[0] for line in lines[6:8]] == ["1", "2"]
    assert {len(line) for line in lines[5:8]} == {len(lines[5])}
    assert lines[7].split()[-1] == "0:00" and "%" in lines[7]


def test_on_a_terminal_an_epoch_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run() == 0
    assert "epoch 1" in capsys.readouterr().err


def test_durations_are_shown_as_clocks_show_them():
    assert [train.show(s) for s in (0, 59.6, 754, 3600, 3723)] == [
        "0:00",
        "1:00",
        "12:34",
        "1:00:00",
        "1:02:03",
    ]


# ---- 10 Evaluate ----


class Recorder(nn.Module):
    """Logits are three fixed sums of an image; remembers what it was shown, and how."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen, self.modes = [], []

    def forward(self, images):
        self.seen.append(images)
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.linear(images.flatten(1))


@pytest.mark.parametrize("n", [1, 999, 1000, 1001, 2345])
def test_evaluate_counts_every_image_exactly_once(n):
    """In order, only normalised, in eval mode, without gradients; as if it were one big batch."""
    images = torch.randint(256, (n, 3, 1, 1), generator=rng(n), dtype=torch.uint8)
    model = Recorder()
    logits = evaluate.predict(model, images, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    pixels = (images.view(n, 3) / 255 - mean) / std
    close(torch.cat(model.seen).view(n, 3), pixels, 1e-5)
    close(logits, model.linear(pixels).detach(), 1e-5)
    assert set(model.modes) == {(False, False)} and logits.dtype == torch.float32


def test_evaluation_in_low_precision_returns_float32():
    model = VisionTransformer(ViTConfig(8, 4, num_classes=3, dim=8, depth=1, heads=2))
    seen = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    logits = evaluate.predict(model, DATASET.test_images, DATASET.mean, DATASET.std, torch.bfloat16)
    assert seen == [torch.bfloat16] and logits.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_model_in_the_mode_it_found(training):
    model = VisionTransformer(ViTConfig(8, 4, num_classes=3, dim=8, depth=1, heads=2)).train(
        training
    )
    evaluate.predict(model, DATASET.test_images, DATASET.mean, DATASET.std)
    assert {part.training for part in model.modules()} == {training}


CASES = [(200, 4, 0), (37, 3, 1), (64, 10, 2), (1, 2, 3)]


def predictions(n, K, seed):
    """Logits and labels; the last class is never the truth, the first is never predicted."""
    logits = 2 * torch.randn(n, K, generator=rng(seed))
    logits[:, 0] = -9
    labels = torch.randint(K - 1, (n,), generator=rng(seed + 1))
    return logits, labels, [f"class {i}" for i in range(K)]


@pytest.mark.parametrize("n, K, seed", CASES)
def test_the_confusion_matrix_has_class_counts_as_rows_and_accuracy_as_trace(n, K, seed):
    """confusion[i][j]: images of class i taken for j, counted in a loop."""
    logits, labels, classes = predictions(n, K, seed)
    metrics = evaluate.measure(logits, labels, classes)
    expected = [[0] * K for _ in range(K)]
    for row, label in zip(logits.tolist(), labels.tolist()):
        expected[label][row.index(max(row))] += 1
    assert metrics["confusion_matrix"] == expected and metrics["images"] == n
    assert metrics["accuracy"] == pytest.approx(sum(expected[i][i] for i in range(K)) / n)
    assert metrics["classes"] == classes


@pytest.mark.parametrize("n, K, seed", CASES)
def test_precision_recall_and_f1_are_what_their_definitions_say(n, K, seed):
    """Of those taken for i, and of those that are i, the share that is both; their harmonic mean.

    Nothing taken for i: 0, and no nan (which JSON does not know).
    """
    logits, labels, classes = predictions(n, K, seed)
    metrics = evaluate.measure(logits, labels, classes)
    pairs = list(zip(logits.argmax(1).tolist(), labels.tolist()))
    for i in range(K):
        hits = sum(p == t == i for p, t in pairs)
        taken, there = sum(p == i for p, _ in pairs), sum(t == i for _, t in pairs)
        assert metrics["precision"][i] == pytest.approx(hits / taken if taken else 0)
        assert metrics["recall"][i] == pytest.approx(hits / there if there else 0)
        assert metrics["f1"][i] == pytest.approx(2 * hits / (taken + there) if hits else 0)
    assert "NaN" not in json.dumps(metrics)


@pytest.mark.parametrize("n, K, seed", CASES)
def test_loss_is_the_mean_over_images_of_minus_log_p(n, K, seed):
    logits, labels, classes = predictions(n, K, seed)
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        total += math.log(sum(map(math.exp, row))) - row[label]
    assert evaluate.measure(logits, labels, classes)["loss"] == pytest.approx(total / n)


@pytest.mark.parametrize("n, K, seed", CASES)
def test_calibration_error_is_the_gap_between_confidence_and_accuracy_over_15_bins(n, K, seed):
    """Sum over bins of |sum of (confidence - correct)| / n; bins (0, 1/15], ..., (14/15, 1]."""
    logits, labels, classes = predictions(n, K, seed)
    gaps = [0.0] * 15
    for row, label in zip(logits.double().softmax(1).tolist(), labels.tolist()):
        confidence = max(row)
        [b] = [b for b in range(15) if b / 15 < confidence <= (b + 1) / 15]
        gaps[b] += confidence - (row.index(confidence) == label)
    ece = evaluate.measure(logits, labels, classes)["ece"]
    assert ece == pytest.approx(sum(map(abs, gaps)) / n)


def test_a_confidence_on_the_edge_of_a_bin_belongs_to_the_lower_one():
    """1/3 = 5/15, wrong, and 0.34, right: in one bin the two gaps would cancel in part."""
    logits = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.34, 0.33, 0.33]], dtype=torch.float64).log()
    metrics = evaluate.measure(logits, torch.tensor([1, 0]), ["a", "b", "c"])
    assert metrics["ece"] == pytest.approx((1 / 3 + (1 - 0.34)) / 2)


def test_the_description_says_it_all_in_a_table():
    """Worked by hand: 3 cats (2 right, 1 taken for a dog), 1 dog, no eel."""
    logits = torch.eye(3)[[0, 0, 1, 1]]
    text = evaluate.describe(
        evaluate.measure(logits, torch.tensor([0, 0, 0, 1]), ["cat", "dog", "eel"])
    )
    first, head, *rows, last = text.splitlines()
    assert first.startswith("accuracy 75.00% of 4 images | loss ") and "calibration error" in first
    assert [row.split() for row in rows] == [
        ["cat", "3", "100.00%", "66.67%", "80.00%"],
        ["dog", "1", "50.00%", "100.00%", "66.67%"],
        ["eel", "0", "0.00%", "0.00%", "0.00%"],
    ]
    assert last == "commonest mistakes: cat for dog 1x"
    assert len({len(line) for line in (head, *rows)}) == 1


def test_the_commonest_mistakes_come_first_and_are_at_most_five():
    wrong = [(0, 1)] * 3 + [(1, 2)] * 5 + [(2, 0)] + [(0, 2), (1, 0)] * 2 + [(2, 1)]
    labels, predicted = map(torch.tensor, zip(*wrong))
    text = evaluate.describe(evaluate.measure(torch.eye(3)[predicted], labels, ["a", "b", "c"]))
    mistakes = text.splitlines()[-1].removeprefix("commonest mistakes: ").split("; ")
    assert mistakes[:2] == ["b for c 5x", "a for b 3x"] and len(mistakes) == 5


def test_attention_rollout_is_the_product_of_half_attention_half_identity():
    """The product over blocks, last one leftmost, of (mean over heads + 1) / 2, in loops."""
    L, B, h, T = 3, 2, 4, 5
    maps = torch.randn(L, B, h, T, T, generator=rng(0), dtype=torch.float64).softmax(-1)
    rollout = evaluate.attention_rollout(maps)
    for b in range(B):
        expected = [[float(i == j) for j in range(T)] for i in range(T)]
        for block in range(L):
            flow = [
                [(sum(maps[block, b, :, i, j].tolist()) / h + (i == j)) / 2 for j in range(T)]
                for i in range(T)
            ]
            expected = [
                [sum(flow[i][k] * expected[k][j] for k in range(T)) for j in range(T)]
                for i in range(T)
            ]
        close(rollout[b], torch.tensor(expected, dtype=torch.float64))
    close(rollout.sum(-1), torch.ones(B, T, dtype=torch.float64))


def make_checkpoint(classes, **network):
    """What train.py would have written for these classes, without training."""
    config = ViTConfig(
        8, 4, num_classes=len(classes), **{"dim": 8, "depth": 2, "heads": 2} | network
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(config)
    recipe = {
        "dataset": "shapes",
        "data_dir": "data",
        "val_size": 20,
        "seed": 0,
        "download_url": None,
    }
    statistics = {"mean": DATASET.mean, "std": DATASET.std, "classes": list(classes)}
    facts = {"format": evaluate.FORMAT, "epoch": 3, "vit": asdict(config), "train": recipe}
    return {**facts, **statistics, "model": model.state_dict(), "ema": None}


@pytest.mark.parametrize("K, inches", [(10, (7, 6.5)), (1000, (47.5, 47))])
def test_the_confusion_matrix_of_many_classes_is_no_larger_than_that_of_a_hundred(
    K, inches, monkeypatch
):
    """At half an inch a class a thousand would take gigabytes, after the last epoch."""
    sizes = []
    monkeypatch.setattr(evaluate, "new_figure", lambda figsize: sizes.append(figsize) or kill())
    zeros = torch.zeros(K, K, dtype=torch.int64).tolist()
    with pytest.raises(Kill):
        PLOTS["plot_confusion_matrix"]("", {"confusion_matrix": zeros, "classes": range(K)}, "")
    assert sizes == [inches]


def test_a_log_that_was_edited_is_named():
    """A spreadsheet saves it with semicolons, or with cells too many."""
    for text in ("epoch;lr\n1;0.1\n", "epoch,lr\n1,0.1,5\n"):
        Path("log.csv").write_text(text)
        with pytest.raises(ValueError, match="log.csv is not a log of train.py"):
            evaluate.read_log("log.csv")


@pytest.mark.parametrize("K, pool", [(2, "cls"), (30, "mean")])
def test_evaluation_writes_metrics_and_pictures_for_any_number_of_classes(K, pool, monkeypatch):
    for name, plot in PLOTS.items():
        monkeypatch.setattr(evaluate, name, plot)
    classes = [f"a class with a long name {i} $^$" for i in range(K)]  # no formula
    os.makedirs("out")
    Path("out/log.csv").write_text(
        ",".join(COLUMNS) + "\n1,0.1,2.5,2.4,0.1,,0.2,1.0,0,10.0,0.1,3.0\n"
    )
    dataset = make_dataset(classes, n=60, n_test=K)
    metrics = evaluate.evaluate(
        make_checkpoint(classes, pool=pool), "out", device="cpu", dataset=dataset
    )
    assert (
        json.loads(Path("out/metrics.json").read_text()) == metrics and len(metrics["classes"]) == K
    )
    names = {"attention", "confusion_matrix", "curves", "mistakes", "positions"}
    assert {path.stem for path in Path("out").glob("*.png")} == names
    for name in names:
        with Image.open(f"out/{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 20 and max(picture.size) < 3000


def test_the_pictures_are_named_after_the_data_and_show_images_from_all_over_the_set(monkeypatch):
    """A folder of pictures gives its own name, as "folder" says nothing. Of 80 images every tenth
    would not do: of ten shapes that come in turn, it would be the same one eight times."""
    titles, shown = [], []
    monkeypatch.setattr(evaluate, "plot_positions", lambda path, model, title: titles.append(title))
    monkeypatch.setattr(evaluate, "plot_attention", lambda path, model, *rest: shown.append(rest))
    checkpoint = make_checkpoint(DATASET.classes)
    dataset = make_dataset(n_test=80)
    for source, data_dir in (("shapes", "data"), ("folder", "my/pets/")):
        checkpoint["train"] |= {"dataset": source, "data_dir": data_dir}
        evaluate.evaluate(checkpoint, "out", device="cpu", dataset=dataset)
    assert titles == ["shapes", "pets"]
    assert [title for *_, title in shown] == ["shapes, test images", "pets, test images"]
    chosen = [0, 11, 22, 33, 45, 56, 67, 79]
    assert torch.equal(shown[0][0], dataset.test_images[chosen])
    dataset = make_dataset(n_test=5)
    evaluate.evaluate(checkpoint, "out", device="cpu", dataset=dataset)
    assert torch.equal(shown[2][0], dataset.test_images)  # of few images all


def test_the_attention_picture_is_bright_where_the_rollout_is_highest(monkeypatch):
    """Row 0 of the rollout without its own column; a picture of one colour is dimmed elsewhere."""
    shown = []
    monkeypatch.setattr(evaluate, "show_image", lambda axis, image, *_: shown.append(image))
    checkpoint = make_checkpoint("abc", dim=16)
    for name in ("qkv.weight", "proj.weight"):
        checkpoint["model"][f"blocks.0.attn.{name}"] *= 60
    model = evaluate.build_model(checkpoint)
    images = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    x = data.normalize(images, DATASET.mean, DATASET.std)
    flow = evaluate.attention_rollout(model.attention_maps(x))[0, 0, 1:]
    PLOTS["plot_attention"]("a.png", model, images, DATASET.mean, DATASET.std, "title")
    original, heat = shown[:2]
    assert torch.equal(original, images[0])
    corners = heat[0, [0, 0, -1, -1], [0, -1, 0, -1]].float()
    assert torch.equal(corners.argsort(), flow.argsort()) and heat.max() == 200


def test_the_mistakes_are_the_wrong_answers_the_model_was_surest_of(monkeypatch):
    shown = []
    monkeypatch.setattr(
        evaluate, "show_image", lambda axis, image, title: shown.append((image, title))
    )
    logits = torch.tensor([[3.0, 0], [0, 2.0], [0, 5.0], [4.0, 0], [1.0, 0]])
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    PLOTS["plot_mistakes"](
        "m.png", images, torch.tensor([1, 0, 1, 0, 1]), logits, ["cat", "dog"], "title"
    )
    assert [int(image[0, 0, 0]) for image, _ in shown] == [0, 1, 4]
    assert [title for _, title in shown] == [
        "cat, 95% sure\nis dog",
        "dog, 88% sure\nis cat",
        "cat, 73% sure\nis dog",
    ]


@pytest.mark.parametrize(
    "name, size", [("wide.png", (50, 20)), ("tall.jpg", (9, 31)), ("dot.png", (1, 1))]
)
def test_your_own_picture_is_classified_with_three_probabilities(name, size, plain, capsys):
    """Of any size and format; the same softmax as by hand."""
    Image.new("RGB", size, (200, 90, 30)).save(name)
    assert evaluate.main([str(plain / "best.pt"), "--images", name, name, "--device", "cpu"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    model = evaluate.build_model(evaluate.load_checkpoint(plain / "best.pt"))
    image = data.open_image(name, 8)[None]
    probabilities = model(data.normalize(image, DATASET.mean, DATASET.std)).softmax(1)[0].tolist()
    answers = sorted(zip(probabilities, DATASET.classes), reverse=True)
    assert first == second == f"{name}: " + ", ".join(f"{label} {p:.1%}" for p, label in answers)


def test_of_many_classes_the_three_likeliest_are_named_and_of_two_both():
    Image.new("RGB", (8, 8)).save("a.png")
    for K, count in ((2, 2), (30, 3)):
        [line] = evaluate.classify(make_checkpoint([f"c{i}" for i in range(K)]), ["a.png"], "cpu")
        assert line.count("%") == count


def test_the_validation_split_of_changed_pictures_is_refused(plain):
    """The same number of them in another order: most of the split was trained on."""
    best = evaluate.load_checkpoint(str(plain / "best.pt"))
    changed = replace(DATASET, train_images=DATASET.train_images.flip(0))
    with pytest.raises(ValueError, match="the validation images are lost among them"):
        evaluate.evaluate(best, "out", "val", device="cpu", dataset=changed)
    assert evaluate.evaluate(best, "out", "val", device="cpu", dataset=DATASET)["images"] == 20


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_validation_split_gives_again_the_accuracy_in_the_log(ema, monkeypatch, capsys):
    """Of the chosen epoch, from the checkpoint alone: 20 images, counted exactly."""
    assert run("--epochs", 4, "--mixup", 0, "--cutmix", 0, "--seed", 5, "--ema-decay", ema) == 0
    best = torch.load("out/best.pt", weights_only=True)
    row = best["history"][best["epoch"] - 1]
    accuracy = row["ema_accuracy"] if ema else row["val_accuracy"]
    assert evaluate.main(["out/best.pt", "--split", "val", "--device", "cpu"]) == 0
    metrics = json.loads(Path("out/metrics_val.json").read_text())
    assert metrics["images"] == 20 and round(20 * metrics["accuracy"]) == pytest.approx(
        20 * accuracy
    )
    assert metrics["split"] == "val" and metrics["epoch"] == best["epoch"]
    if not ema:
        assert metrics["loss"] == pytest.approx(row["val_loss"], rel=1e-6)
    assert f"epoch {best['epoch']}, val images of shapes" in capsys.readouterr().out


def test_the_program_evaluates_the_test_split_from_the_checkpoint_alone(plain, capsys, monkeypatch):
    """The same numbers that the end of training found, beside the checkpoint or in --out; and the
    curves of the log beside the checkpoint."""
    logs = []
    monkeypatch.setattr(evaluate, "plot_curves", lambda path, log, title: logs.append((path, log)))
    shutil.copytree(plain, "copy")
    os.remove("copy/metrics.json")
    expected = json.loads((plain / "metrics.json").read_text())
    assert evaluate.main(["copy/best.pt", "--device", "cpu"]) == 0
    assert evaluate.main(["copy/best.pt", "--device", "cpu", "--out", "new"]) == 0
    for folder in ("copy", "new"):
        assert json.loads(Path(folder, "metrics.json").read_text()) == expected
    history = evaluate.read_log(plain / "log.csv")
    assert len(history) == 2
    assert logs == [(f"{folder}/curves.png", history) for folder in ("copy", "new")]
    assert expected["images"] == 30 and expected["split"] == "test"
    assert "accuracy" in capsys.readouterr().out


class Sealed:
    """The test split, behind a seal: to know how many images there are is all that is allowed."""

    def __len__(self):
        return 30

    def __getattr__(self, name):
        raise AssertionError(f"the test split was touched: {name}")

    __getitem__ = __iter__ = lambda self, *_: self.touched


def test_training_never_reads_the_test_split(monkeypatch, plain):
    """Until finish(): no choice is made on it."""
    monkeypatch.setattr(
        data, "load", lambda *_: replace(DATASET, test_images=Sealed(), test_labels=Sealed())
    )
    real = train.finish

    def finish(run):
        run.dataset = DATASET
        real(run)

    monkeypatch.setattr(train, "finish", finish)
    assert run() == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None
    with pytest.raises(AssertionError, match="touched"):
        Sealed()[0]


# ---- 11 Bad input ----


def picture(path, colour=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, colour, colour)).save(path)


def pictures(*classes, test=None):
    for part, names in (("train", classes), ("test", test or classes)):
        for name in names:
            for i in range(3):
                picture(f"pics/{part}/{name}/{i}.png", 40 * i)


def no_such_folder():
    """Nothing to prepare."""


def an_empty_class():
    pictures("cat", "dog")
    os.makedirs("pics/train/eel")
    os.makedirs("pics/test/eel")


def other_classes_in_test():
    pictures("cat", "dog", test=("cat", "eel"))


def a_corrupt_picture():
    pictures("cat", "dog")
    Path("pics/train/dog/1.png").write_bytes(png_bytes()[:40])


def a_file_in_the_way():
    Path("out").write_text("mine")


def a_file_above():
    Path("file").write_text("mine")


FOLDER = "--dataset folder --data-dir pics "
BAD_INPUT = {  # flags: what the message must say, or (what to prepare, what the message must say)
    "--epochs 0": "epochs must be at least 1, got 0",
    "--epochs -3": "epochs must be at least 1, got -3",
    "--batch-size 0": "batch_size must be at least 1, got 0",
    "--val-size 0": "val_size must be at least 1, got 0",
    "--eval-every 0": "eval_every must be at least 1",
    "--save-every 0": "save_every must be at least 1",
    "--lr 0": "lr must be positive, got 0",
    "--lr -0.1": "lr must be positive, got -0.1",
    "--lr nan": "lr must be positive, got nan",
    "--lr inf": "lr must be positive, got inf",
    "--max-minutes 0": "max_minutes must be positive",
    "--max-minutes nan": "max_minutes must be positive",
    "--weight-decay -1": "weight_decay must be at least 0",
    "--weight-decay nan": "weight_decay must be at least 0",
    "--weight-decay inf": "weight_decay must be at least 0",
    "--grad-clip -1": "grad_clip must be at least 0",
    "--mixup -1": "mixup must be at least 0",
    "--cutmix inf": "cutmix must be at least 0",
    "--randaugment-ops -1": "randaugment_ops must be at least 0",
    "--randaugment-magnitude 31": "randaugment_magnitude must be between 0 and 30, got 31",
    "--randaugment-prob 1.5": "randaugment_prob must be between 0 and 1",
    "--mix-until 1.1": "mix_until must be between 0 and 1",
    "--pct-start 1": "pct_start must be at least 0 and below 1, got 1.0",
    "--label-smoothing 1": "label_smoothing must be at least 0 and below 1, got 1.0",
    "--ema-decay 1": "ema_decay must be at least 0 and below 1, got 1.0",
    "--ema-decay -0.1": "ema_decay must be at least 0 and below 1, got -0.1",
    "--seed -1": "seed must be at least 0 and below 2^32, got -1",
    "--seed 4294967296": "seed must be at least 0 and below 2^32",  # torch takes it for seed 0
    "--crop centre": 'crop must be pad, resized or none, got "centre"',
    "--randaugment-fill red": 'randaugment_fill must be black or mean, got "red"',
    "--dtype int8": "dtype must be auto, float32, bfloat16 or float16",
    "--dataset mnist": "dataset must be cifar10, cifar100, folder or shapes",
    "--preset huge": "invalid choice: 'huge'",
    "--device gpu": 'unknown device "gpu"',
    "--image-size 10": "image_size 10 is not divisible by patch_size 4",
    "--dim 9": "dim 9 is not divisible by heads 2",
    "--depth 0": "depth must be at least 1, got 0",
    "--dim -8": "dim must be at least 1",
    "--patch-size 0": "patch_size must be at least 1",
    "--heads 0": "heads must be at least 1",
    "--mlp-ratio 0": "mlp_ratio 0.0 times dim 8",
    "--mlp-ratio 1e12": "out of memory",
    "--mlp-ratio 1e18": "out of memory",  # torch: overflow
    "--dropout 1": "dropout must be in [0, 1)",
    "--drop-path nan": "drop_path must be in [0, 1)",
    "--pool max": 'pool must be "cls" or "mean", got "max"',
    "--in-channels 1": "in_channels must be 3 for pictures, got 1",
    "--num-classes 7": "num_classes is 7, but the dataset has 3 classes",
    "--dataset cifar10": "cifar10 has images of 32x32 pixels, image_size is 8",
    "--batch-size 1": "batch_size 1 leaves nothing to mix with",
    "--batch-size 1 --mixup 0": "batch_size 1 leaves nothing to mix with",
    "--batch-size 1 --cutmix 0": "batch_size 1 leaves nothing to mix with",
    "--batch-size 41": "batch_size 41 is more than the 40 training images",
    "--val-size 60": "val_size must be between 1 and 59 for 60 training images, got 60",
    "--layers 3": "unrecognized arguments: --layers 3",
    "--epoch 3": "unrecognized arguments: --epoch 3",
    "--resume yes": "unrecognized arguments: yes",
    "train.pt": "unrecognized arguments: train.pt",
    "--epochs three": "argument --epochs: invalid int value: 'three'",
    "--batch-size 8.5": "argument --batch-size: invalid int value: '8.5'",
    "--lr fast": "argument --lr: invalid float value: 'fast'",
    "--epochs": "argument --epochs: expected one argument",
    FOLDER: (no_such_folder, "no folder pics/train"),
    FOLDER + "--val-size 1": (an_empty_class, "eel"),
    FOLDER + "--val-size 2": (other_classes_in_test, "dog, eel"),
    FOLDER + "--val-size 3": (a_corrupt_picture, "cannot read the image pics/train/dog/1.png"),
    "--seed 0": (a_file_in_the_way, "cannot write to the output folder out"),
    "--out file/below/it": (a_file_above, "file is not a folder"),
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_two(flags, capsys):
    """On stderr, without a traceback; nothing is written or changed."""
    prepare, message = no_such_folder, BAD_INPUT[flags]
    if isinstance(message, tuple):
        prepare, message = message
    prepare()
    before = tree()
    assert run(*flags.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert tree() == before


def test_an_error_of_many_lines_is_one_line(capsys):
    assert evaluate.fail(OSError("two\n  lines")) == 2
    assert capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused(name, monkeypatch, capsys):
    pretend(monkeypatch, None)
    assert run("--device", name) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f'device "{name}" is not available here' in line and not tree()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_epoch(monkeypatch, capsys):
    """Not after it, when it is lost. (The tests may run as root, who can write anywhere.)"""
    os.makedirs("out")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK)
    assert run() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot write to the output folder out" in line and tree() == {"out": None}


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run() == 2
    assert (
        "batch_size 8 is not divisible by the 3 processes" in capsys.readouterr().err and not tree()
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "the following arguments are required: checkpoint"),
        ("{best} --split train", "invalid choice: 'train'"),
        ("{best} --batch-size 3", "unrecognized arguments: --batch-size 3"),
        ("{best} --image a.png", "unrecognized arguments: --image a.png"),
        ("{best} --images none.png", "cannot read the image none.png"),
        ("{best} --images broken.png", "cannot read the image broken.png"),
        ("{best} --device cuda", "is not available here"),
        ("{best} --out file/new", "file"),
        (
            "{best} --data-dir pics",
            "the checkpoint knows the classes cat, dog, eel; the data have ant, bee",
        ),
    ],
)
def test_bad_input_to_evaluate_is_one_line_and_exit_code_two(
    flags, message, plain, monkeypatch, capsys
):
    """Nothing is written or changed here either."""
    pretend(monkeypatch, None)
    a_file_above()
    Path("broken.png").write_bytes(png_bytes()[:40])
    shutil.copy(plain / "best.pt", "best.pt")
    if "pics" in flags:
        monkeypatch.setattr(data, "load", lambda *_: make_dataset(("ant", "bee")))
    before = tree()
    assert evaluate.main(flags.format(best="best.pt").split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and tree() == before


# ---- 12 Real processes ----

HERE = Path(train.__file__).parent
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}


STARTED = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while STARTED:
        STARTED[-1].terminate()
        STARTED.pop().communicate(timeout=60)


def start(program, *words):
    """A process in the test's folder, with one thread; its stdout and stderr are pipes."""
    command = [
        sys.executable,
        "-u",
        *([str(HERE / program)] if program.endswith(".py") else ["-m", program]),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += map(str, words)
    STARTED.append(subprocess.Popen(command, env=ALONE, start_new_session=True, **pipes))
    return STARTED[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DATASET as a folder of PNGs, decoded and cached; the flags of a run on it."""
    root = tmp_path_factory.mktemp("folder")
    for part in ("train", "test"):
        images, labels = getattr(DATASET, f"{part}_images"), getattr(DATASET, f"{part}_labels")
        for i, (image, label) in enumerate(zip(images, labels)):
            path = root / part / DATASET.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    data.load("folder", str(root), 8)
    return [*TINY, "--dataset", "folder", "--data-dir", str(root)]


def wait_for(process, start):
    """Read the output up to a line that starts like this."""
    for line in process.stdout:
        if line.strip().startswith(start):
            return
    raise AssertionError(process.stderr.read())


def test_signals_end_a_real_process_with_two_lines_and_their_exit_code(folder, capsys):
    """130 and 143, no traceback, and a command that works. (SIGTERM goes to the whole group.)"""
    flags = [*folder, "--epochs", "100000"]
    numbers = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {number: start("train.py", *flags, "--out", f"out {number}") for number in numbers}
    for number, process in processes.items():
        wait_for(process, "2 ")
        os.killpg(process.pid, number) if number == signal.SIGTERM else process.send_signal(number)
    for number, process in processes.items():
        out, err = process.communicate(timeout=60)
        *_, first, second = out.splitlines()
        assert process.returncode == numbers[number] and not err
        assert str(HERE / "train.py") in second  # it is called from another folder
        told = rf"stopped by {number.name}: out {number:d}/last.pt holds epoch (\d+) of 100000"
        epoch = int(re.fullmatch(told, first)[1])  # log.csv may be one row behind it, until then
        assert train.main([*continuing(second), "--max-minutes", "1e-9"]) == 0
        assert len(read_csv(f"out {number}/log.csv")) == epoch + 1


def torture(folder, kills, seed):
    """Kill -9 a run of 40 epochs at random moments; its files must always be whole."""
    moments = random.Random(seed)
    flags = [*folder, *FULL, "--epochs", "40", "--dtype", "float32"]  # float16 crawls on a CPU
    assert train.main([*flags, "--out", "straight"]) == 0
    for _ in range(kills):
        process = start("train.py", *flags, "--out", "out", "--resume")
        wait_for(process, "epoch")
        for _ in range(moments.randrange(40 // kills)):
            next(process.stdout)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for name in ("last.pt", "best.pt"):
            if os.path.exists(f"out/{name}"):
                evaluate.load_checkpoint(f"out/{name}")
        if os.path.exists("out/log.csv"):
            rows = read_csv()
            assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(rows))]
            assert all(None not in row.values() and float(row["seconds"]) for row in rows)
    assert train.main([*flags, "--out", "out", "--resume"]) == 0
    for name in ("last.pt", "best.pt"):
        assert difference(contents(f"out/{name}"), contents(f"straight/{name}")) is None
    assert len(read_csv()) == 40


def test_three_kills_lose_nothing(folder):
    """SIGKILL cannot be caught: only files that are always whole help."""
    torture(folder, kills=3, seed=0)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(folder):
    torture(folder, kills=20, seed=1)


def torchrun(*flags):
    launch = ("--standalone", "--nproc_per_node=2", HERE / "train.py")
    return start("torch.distributed.run", *launch, *flags)


def assert_like_one_process(out):
    """The same log and weights as the run in one/, but for float32's rounding."""
    for row, expected in zip(read_csv(f"{out}/log.csv"), read_csv("one/log.csv"), strict=True):
        for name in set(COLUMNS) - set(WALL_CLOCK) - {"ema_accuracy"}:
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4), name
    ours, theirs = (
        evaluate.load_checkpoint(f"{folder}/last.pt")["model"] for folder in (out, "one")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert Path(out, "metrics.json").exists()


def test_two_processes_train_like_one(folder):
    """Same batches, same schedule, gradients averaged. And what two have begun, here copied when
    they had just saved their first epoch, one can finish."""
    flags = [*folder, "--epochs", "5"]
    process = torchrun(*flags, "--out", "two")
    wait_for(process, "1 ")
    os.makedirs("begun")
    for name in ("best.pt", "last.pt"):
        shutil.copy(f"two/{name}", "begun")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("wrote metrics.json") == 1  # rank 0 alone evaluates and prints
    assert train.main([*flags, "--out", "one"]) == 0
    assert train.main([*flags, "--out", "begun", "--resume"]) == 0
    for out in ("two", "begun"):
        assert_like_one_process(out)


@pytest.mark.slow
def test_two_processes_are_out_of_time_together(folder):
    """Rank 0's clock decides, and the command that continues is torchrun's."""
    flags = [*folder, "--epochs", "5"]
    process = torchrun(*flags, "--out", "two", "--max-minutes", "1e-9")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (
        f"continue with: torchrun --nproc_per_node=2 {HERE / 'train.py'}" in out
        and len(read_csv("two/log.csv")) == 1
    )
    assert train.main([*flags, "--out", "one"]) == 0
    assert torchrun(*flags, "--out", "two", "--resume").wait(120) == 0
    assert_like_one_process("two")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
@pytest.mark.parametrize("victim", [0, -1])
def test_a_killed_rank_ends_the_job_and_one_process_goes_on(victim, folder):
    """torchrun ends the other one; what was saved is whole."""
    flags = [*folder, "--out", "out", "--epochs", "100000"]
    process = torchrun(*flags)
    wait_for(process, "2 ")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[victim]), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None) and "train.py" in err
    epochs = len(read_csv())
    assert train.main([*flags, "--resume", "--max-minutes", "1e-9"]) == 0
    assert len(read_csv()) == epochs + 1


def test_bad_input_to_the_real_programs_is_one_line_and_exit_code_two():
    """Nothing of the above depends on being called in process."""
    for process in [start("train.py", "--epochs", "0"), start("evaluate.py", "none.pt")]:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and not out
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert not tree()


def test_importing_and_help_are_quick():
    """No torchvision, no matplotlib: they take longer to import than all the rest."""
    code = """import sys, train, evaluate
try: train.main(['--help'])
except SystemExit: assert not {'torchvision', 'matplotlib', 'PIL'} & set(sys.modules)"""
    process = subprocess.run(
        [sys.executable, "-c", code], env=ALONE, capture_output=True, text=True
    )
    assert process.returncode == 0 and process.stdout.startswith("usage: ") and not process.stderr


# ---- 13 A GPU that is not there ----

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
READS = ("item", "tolist", "nonzero", "equal", "__bool__", "__int__", "__float__")


class PretendedGPU(TorchFunctionMode):
    """Tensors that are moved to cuda stay on the CPU, but say they are there, and keep apart.

    As on a real one, a call with tensors of both kinds is refused, unless one is a single number.
    `waits` lists the calls for which the CPU would wait for the GPU: what reads from it, and what
    copies to it (from ordinary memory).
    """

    waits = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def is_there(tensor):  # storages bear the mark, so that views share it
            return hasattr(tensor.untyped_storage(), "is_on_gpu")

        def tensors(tree):
            return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

        if func == torch.Tensor.device.__get__:
            return CUDA if is_there(args[0]) else CPU
        name, kwargs, given = func.__name__, dict(kwargs or {}), tensors((args, kwargs))
        target = CPU if name == "cpu" else kwargs.get("device")
        if "device" in kwargs:
            kwargs["device"] = CPU
        if name == "to":
            target = next((x for x in args if isinstance(x, torch.device)), target)
            args = [CPU if x is target else x for x in args]
        source = any(map(is_there, given))
        goal = torch.device(target).type == "cuda" if target else source
        may_mix = ("to", "copy_", "__set__", "_has_compatible_shallow_copy_type")
        if name not in may_mix and len({is_there(x) for x in given if x.ndim}) == 2:
            raise RuntimeError(f"{name}: expected all tensors on one device, found cuda and cpu")
        if source and name == "numpy":
            raise TypeError("can't convert a cuda tensor to numpy")
        copies = given or name in ("tensor", "as_tensor")
        if source != goal and copies or source and name in READS:
            self.waits += (name,)
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            if is_there(tensor) != goal:
                if any(tensor is x for x in given):  # to() had nothing to do
                    out = tensor = tensor.clone()
                if goal:
                    tensor.untyped_storage().is_on_gpu = True
        return out


@pytest.fixture
def gpu(monkeypatch):
    """`with gpu:` tensors can be on cuda. What torch itself would ask a GPU is answered here."""

    def group(*args, real=torch._C._group_tensors_by_device_and_dtype):
        return {(found[0][0][0].device, key[1]): found for key, found in real(*args).items()}

    def on_cpu(real):
        return lambda device, *args, **kwargs: real("cpu", *args, **kwargs)

    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group)
    monkeypatch.setattr(torch, "autocast", on_cpu(torch.autocast))
    monkeypatch.setattr(torch.amp, "GradScaler", on_cpu(torch.amp.GradScaler))
    monkeypatch.setattr(evaluate, "pick_device", torch.device)
    monkeypatch.setattr(train, "can_compile", lambda device: False)
    monkeypatch.setattr(train, "save_pause", lambda device: 0.0)
    return PretendedGPU()


def test_the_pretended_gpu_keeps_tensors_apart_and_sees_who_waits(gpu):
    """Support code is tested too."""
    x = torch.ones(3)
    with gpu:
        y = x.to(CUDA)
        assert (x.device, y.device, y[1:].device, (2 * y).device) == (CPU, CUDA, CUDA, CUDA)
        assert torch.zeros(2, device="cuda").device == CUDA and y.cpu().device == CPU
        assert nn.Linear(3, 3).to(CUDA)(y).device == CUDA and y.to(torch.float64).device == CUDA
        y.mul_(2)
        assert x.tolist() == [1, 1, 1] and y.cpu().tolist() == [2, 2, 2]
        (y * torch.tensor(3.0)).sum()
        assert gpu.waits == ("to", "cpu", "to", "to", "cpu")  # x, y, two parameters, y
        assert y.sum().item() == 6 and gpu.waits[5:] == ("item",)
        torch.as_tensor(y, device=CUDA), torch.tensor([1.0], device=CUDA)
        assert gpu.waits[6:] == ("tensor",)
        with pytest.raises(TypeError, match="to numpy"):
            y.numpy()
        for mix in (lambda: x + y, lambda: torch.stack([x, y]), lambda: x[y.long()]):
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                mix()


@pytest.mark.parametrize(
    "flags",
    ["--dtype bfloat16", "--dtype bfloat16 --preset strong --crop resized", " ".join(FULL)],
    ids=["deit", "strong", "float16"],
)
def test_a_run_on_a_gpu_mixes_no_devices_and_resumes_to_the_bits_of_a_cpu(gpu, flags, monkeypatch):
    """What a GPU's own kernels round is another matter; every step here is the CPU's."""
    flags = [*flags.split(), "--epochs", 3]
    with monkeypatch.context() as patch:
        patch.setattr(MultiHeadAttention, "fused", True)  # as it is on a GPU by itself
        assert run(*flags, out="cpu") == 0
    with gpu:
        assert run(*flags, "--device", "cuda") == 0
        assert run(*flags, "--device", "cuda", "--max-minutes", 1e-6, out="stopped") == 0
        assert run(*flags, "--device", "cuda", "--resume", out="stopped") == 0
        for name in ("plot_attention", "plot_positions"):
            monkeypatch.setattr(evaluate, name, PLOTS[name])
        seen = len(gpu.waits)
        assert evaluate.main(["out/best.pt", "--split", "val", "--device", "cuda"]) == 0
        assert len(gpu.waits) > seen  # it was there
    assert difference(outcome("out/last.pt"), outcome("cpu/last.pt")) is None
    assert difference(outcome("stopped/last.pt"), outcome("cpu/last.pt")) is None


def test_each_process_takes_the_gpu_of_its_number(gpu, monkeypatch):
    """Its own, before NCCL starts; else all of them would sit on the first."""
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(train.dist, "init_process_group", lambda name, **_: calls.append(name))
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    preset, flags = train.parse([*TINY, "--device", "cuda", "--dtype", "bfloat16"])
    with gpu:
        ours = train.prepare(preset, flags, rank=1, world=2)
    assert calls == [torch.device("cuda", 1), "nccl"] and ours.device == calls[0]


def test_an_epoch_on_a_gpu_waits_no_oftener_for_more_steps(gpu):
    """Only float16 does: its scaler has to be asked."""
    for dtype, grows in (("bfloat16", False), ("float16", True)):
        waits = []
        for batch in (8, 20):  # 5 steps, 2 steps
            seen = len(gpu.waits)
            flags = ("--dtype", dtype, "--grad-clip", 1, "--ema-decay", 0.9, "--device", "cuda")
            with gpu:
                assert run(*flags, "--batch-size", batch, out=f"{dtype}-{batch}") == 0
            waits.append(len(gpu.waits) - seen)
        assert (waits[0] > waits[1]) == grows and waits[1] > 0


# ---- 14 The files ----


def imports(path):
    """The top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


@pytest.mark.parametrize(
    "file, allowed",
    [
        ("vit.py", {"torch"}),
        ("data.py", {"torch", "torchvision", "numpy", "PIL", "tqdm", "matplotlib"}),
        ("evaluate.py", {"torch", "matplotlib", "vit", "data"}),
        ("muon.py", {"torch"}),
        ("train.py", {"torch", "tqdm", "vit", "data", "evaluate", "muon"}),
        (
            "bench.py",
            {"torch", "torchvision", "PIL", "timm", "vit_pytorch"}
            | {"vit", "data", "evaluate", "muon", "train"},
        ),
    ],
)
def test_files_import_only_what_the_map_allows(file, allowed):
    """Pixels know no model, the model no pixels, and the reader of checkpoints not their writer."""
    assert imports(HERE / file) <= allowed


@pytest.mark.parametrize("file", ["vit.py", "data.py", "evaluate.py", "muon.py", "train.py"])
def test_importing_a_file_runs_nothing(file):
    """A docstring, imports, constants and definitions; what runs stands behind the guard."""
    docstring, *body = ast.parse((HERE / file).read_text()).body
    assert isinstance(docstring.value, ast.Constant)
    if file != "muon.py":  # which is no program
        assert ast.unparse(body.pop().test) == "__name__ == '__main__'"
    assert not [
        node for node in body if isinstance(node, (ast.Expr, ast.If, ast.For, ast.With, ast.Try))
    ]


def test_only_train_py_writes_checkpoints_and_only_evaluate_py_reads_them():
    """One writer, one reader, one word for the format. (data.py reads its own cache.)"""
    writer, reader = ((HERE / name).read_text() for name in ("train.py", "evaluate.py"))
    assert "torch.load" not in writer and "torch.save" not in reader
    assert "weights_only=False" not in writer + reader
