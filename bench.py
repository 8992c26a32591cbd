"""
Side-by-side measurements, as ratios within one run: machines are shared and noisy, so seconds alone
say little.

    python bench.py                   one table; two minutes on two CPU cores; runs on a GPU, too
    pip install timm vit-pytorch      adds those models to the comparison

The variants of a comparison take turns, several times round. A row gives the median, the spread
from the fastest to the slowest turn, and the ratio of its median to that of the comparison's first
row (above 1: slower).
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import augment
import checkpoint
import data
import evaluate
import log
import machine
import optim
import recipe
import train
from muon import Muon
from vit import VisionTransformer, ViTConfig

MEAN, STD = data.CIFAR_STATISTICS["cifar10"]
BYTES_PER_IMAGE = 32.6e6  # memory traffic of a compiled bf16 step of DeiT-Ti: an estimate by count


def wait(device: torch.device):
    """Until the device has done what it was told: an accelerator works on behind the CPU's back."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row(what: str, seconds: list[float], unit: str, base: float) -> float:
    """Print one line of the table, in a unit such as "ms/image". Returns the median in seconds.

    base: seconds that the last column is a ratio to.
    """
    size = {"us": 1e-6, "ms": 1e-3, "s": 1.0}[unit.split("/")[0]]
    middle = statistics.median(seconds)
    spread = f"{min(seconds) / size:.4g} .. {max(seconds) / size:.4g}"
    ratio = f"{middle / base:.2f}"
    print(f"  {what:<58}{middle / size:>9.4g} {unit:<10}{spread:>18}{ratio:>8}", flush=True)
    return middle


def compare(title: str, variants: dict, unit: str, device: torch.device) -> dict:
    """Time variants, {name: (callable, how many things one call handles)}, by turns.

    Prints a row for each, per thing. Returns {name: median in seconds}.
    """
    print(f"\n{title}")
    seconds = {name: [] for name in variants}
    for turn in range(4):  # the first turn warms up and is not counted
        for name, (call, count) in variants.items():
            began = time.perf_counter()
            call()
            wait(device)
            if turn:
                seconds[name].append((time.perf_counter() - began) / count)
    base = statistics.median(next(iter(seconds.values())))
    return {name: row(name, times, unit, base) for name, times in seconds.items()}


def bench_pipeline():
    """(a) Ours, an epoch at a time, against torchvision's classes, an image at a time."""
    from PIL import Image
    from torchvision.transforms import v2

    def per_image(*first):
        crop_flip_augment = [v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), v2.RandAugment(2, 9)]
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        return v2.Compose([*crop_flip_augment, *first, *to_float])

    few = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    many = few.repeat(64, 1, 1, 1)  # 16,384 images
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in few]
    pil, tensors = per_image(v2.PILToTensor()), per_image()
    generator = torch.Generator().manual_seed(0)

    def ours():
        for batch in augment.augment(many, "pad", 2, 9, 1.0, None, generator).split(1024):
            data.normalize(batch, MEAN, STD)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    variants = {
        "augment.augment and data.normalize, 16,384 images at once": (ours, len(many)),
        "torchvision, PIL image by image": (lambda: [pil(image) for image in pictures], len(few)),
        "torchvision, tensor by tensor": (lambda: [tensors(image) for image in few], len(few)),
    }
    title = "(a) training pipeline: crop, flip, RandAugment(2, 9), normalise; one CPU thread"
    compare(title, variants, "us/image", torch.device("cpu"))
    torch.set_num_threads(threads)


def peers(config: ViTConfig) -> dict:
    """Plain ViTs of this size by other hands, without dropout. What is missing is named."""
    found, size, patch = {}, config.image_size, config.patch_size
    depth, heads, dim = config.depth, config.heads, config.dim
    try:
        from timm.models.vision_transformer import VisionTransformer as TimmViT

        sizes = {"img_size": size, "patch_size": patch, "num_classes": config.num_classes}
        sizes |= {"embed_dim": dim, "depth": depth, "num_heads": heads}
        found["timm"] = TimmViT(mlp_ratio=config.mlp_ratio, **sizes)
    except ImportError:
        print("  (timm is not installed: pip install timm)")
    try:
        from vit_pytorch import ViT

        sizes = {"image_size": size, "patch_size": patch, "num_classes": config.num_classes}
        sizes |= {"dim": dim, "depth": depth, "heads": heads, "dim_head": dim // heads}
        found["vit-pytorch"] = ViT(mlp_dim=config.mlp_dim, **sizes)
    except ImportError:
        print("  (vit-pytorch is not installed: pip install vit-pytorch)")
    from torchvision.models import VisionTransformer as TorchvisionViT

    sizes = {"image_size": size, "patch_size": patch, "num_classes": config.num_classes}
    sizes |= {"num_layers": depth, "num_heads": heads, "hidden_dim": dim}
    found["torchvision"] = TorchvisionViT(mlp_dim=config.mlp_dim, **sizes)
    return found


def stepper(model, images, targets, dtype, optimizer=None):
    """A function that does one step (forward, backward, by default fused AdamW) of any model."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bench_models(batch: int, device, half: torch.dtype, compiling: bool):
    """(b) Our model against others', (c) precision, attention, optimizer and compilation."""
    images = torch.randn(batch, 3, 32, 32, device=device)
    targets = torch.full((batch, 10), 0.1, device=device)
    config = ViTConfig(dropout=0.0)
    models = {"ours": VisionTransformer(config), **peers(config)}
    for model in models.values():
        model.to(device).train()

    def forward(model):
        with torch.no_grad():
            model(images)

    runs = {name: (partial(forward, model), batch) for name, model in models.items()}
    compare(f"(b) forward, float32, batch {batch}", runs, "ms/image", device)
    for dtype in dict.fromkeys((torch.float32, half)):  # once, where there is no other
        runs = {
            name: (stepper(model, images, targets, dtype), batch) for name, model in models.items()
        }
        title = f"(b) forward, backward and AdamW, {name_of(dtype)}, batch {batch}"
        compare(title, runs, "ms/image", device)

    variants = {}
    for fused in (False, True):
        for dtype in (torch.float32, half):
            model = VisionTransformer(config).to(device)
            for block in model.blocks:
                block.attn.fused = fused
            name = f"{'fused attention' if fused else 'written-out attention'}, {name_of(dtype)}"
            variants[name] = (stepper(model, images, targets, dtype), batch)
    name = f"{name_of(half)}, dropout {ViTConfig.dropout}"
    model = VisionTransformer(ViTConfig()).to(device)
    variants[name] = (stepper(model, images, targets, half), batch)
    model = VisionTransformer(config).to(device)
    muon = Muon(optim.parameter_groups(model, 0.05), lr=1e-4, fused=True)
    variants[f"{name_of(half)}, Muon"] = (stepper(model, images, targets, half, muon), batch)
    first = {}
    ways = ("the blocks", "the model", *(["the model, CUDA graphs"] * (device.type == "cuda")))
    for what in ways if compiling else ():
        model = VisionTransformer(config).to(device)
        mode = "reduce-overhead" if what.endswith("graphs") else None
        for module in model.blocks if what == "the blocks" else [model]:
            module.compile(dynamic=False, mode=mode)
        step = stepper(model, images, targets, half)
        began = time.perf_counter()
        step()
        wait(device)
        first[what] = time.perf_counter() - began
        variants[f"{name_of(half)}, compiling {what}"] = (step, batch)
    title = f"(c) the same step, batch {batch}, eager, AdamW, no dropout unless it says so"
    compare(title, variants, "ms/image", device)
    for what, seconds in first.items():
        row(f"the first step, which compiles {what}", [seconds], "s", first["the blocks"])


def kept_for_backward(images: torch.Tensor, half: torch.dtype) -> int:
    """Bytes that the forward pass of the `deit` network keeps for its backward pass, eager."""
    model = VisionTransformer(ViTConfig()).to(images.device)
    for block in model.blocks:
        block.attn.fused = True  # as on a GPU
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(images.device.type, half, enabled=half != torch.float32):
            model(images)
    return sum(sizes.values())


def bench_epoch(batch: int, device, half: torch.dtype):
    """(d) Where the time of an epoch of the `deit` recipe goes, (e) memory, (f) the roofline."""
    count = 4 * batch
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (count,), device=device)
    config = recipe.TrainConfig(batch_size=batch, device=str(device))
    compiled = machine.should_compile(None, device)  # as train.py does
    state = optim.build_state(config, ViTConfig(), 10_000, device, compiled)
    state.model.train()
    names = ("augmentation", "normalise and mix", "steps", "validation", "checkpoint")
    parts = {name: [] for name in names}

    def lap(name: str, began: float, scale: float) -> float:
        wait(device)
        parts[name].append((time.perf_counter() - began) * scale)
        return time.perf_counter()

    per_epoch = 45_000 / count
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(4):
            now = time.perf_counter()
            batches = augment.epoch_batches(images, labels, MEAN, STD, 10, config, epoch=turn)
            for i, (x, y) in enumerate(batches):
                if i == 0:  # the first batch brings the whole epoch's augmentation
                    now = lap("augmentation", now, per_epoch)
                else:
                    now = lap("normalise and mix", now, per_epoch * 4)
                optim.train_step(state, x, y, config)
                now = lap("steps", now, per_epoch * 4)
            now = time.perf_counter()
            evaluate.compute_logits(state.model, images, MEAN, STD, state.dtype)
            now = lap("validation", now, 7_000 / count)  # 5,000, and 2,000 clean training images
            checkpoint.save_checkpoint(state.state_dict(), f"{folder}/last.pt")
            lap("checkpoint", now, 1.0)
            if turn == 0:  # warm-up, and compiling
                parts = {name: [] for name in names}
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
    epoch = sum(statistics.median(parts[name]) for name in names[:-1])
    epochs_per_save = max(1.0, train.save_pause(device) / epoch)
    parts["checkpoint"] = [seconds / epochs_per_save for seconds in parts["checkpoint"]]
    print(f"\n(d) an epoch of `deit`, 45,000 images, from pieces of {count:,}; right: the shares")
    total = sum(statistics.median(times) for times in parts.values())
    for name, times in parts.items():
        row(name, times, "s/epoch", total)

    print("\n(e) memory")
    four, eight = (kept_for_backward(images[:n].float(), half) for n in (4, 8))  # weights in both
    print(
        f"  kept for backward, {name_of(half)}, eager: {(eight - four) / 4 / 1e6:.2f} MB an image"
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"  peak of the device, training at batch {batch}: {peak:.2f} GiB")

    peak = machine.measure_peak(device, state.dtype)
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copy = {f"copy of {source.nbytes >> 20} MiB": (lambda: target.copy_(source), 1)}
    [moved] = compare("(f) roofline, against what this machine does", copy, "ms", device).values()
    bandwidth = 2 * source.nbytes / moved  # every byte is read once and written once
    rate = 45_000 / statistics.median(parts["steps"])
    flops = 3 * ViTConfig().flops_per_image
    measured = f"matrix product {peak / 1e12:.2f} TFLOP/s in {name_of(state.dtype)}"
    print(f"  {measured}, copy {bandwidth / 1e9:,.0f} GB/s")
    print(f"  steps {rate:,.0f} images/s: MFU {rate * flops / peak:.1%} of the arithmetic")
    if compiled:
        share = rate * BYTES_PER_IMAGE / bandwidth
        print(f"  and {share:.1%} of the memory bandwidth, at {BYTES_PER_IMAGE / 1e6} MB an image")


def bench_scaling(batch: int, device, dtype):
    """(g) How the cost of a step grows."""
    base = ViTConfig(dropout=0.0, depth=4)
    variants = {}
    for title, config, size in (
        (f"depth 4, 65 tokens, batch {batch}", base, batch),
        (f"depth 4, 65 tokens, batch {batch // 4}", base, batch // 4),
        (f"depth 8, 65 tokens, batch {batch}", replace(base, depth=8), batch),
        (f"depth 4, 17 tokens, batch {batch}", replace(base, patch_size=8), batch),
        (f"depth 4, 257 tokens, batch {batch}", replace(base, patch_size=2), batch),
    ):
        x = torch.randn(size, 3, 32, 32, device=device)
        y = torch.full((size, 10), 0.1, device=device)
        step = stepper(VisionTransformer(config).to(device), x, y, dtype)
        variants[title] = (step, size)
    compare("(g) growth of a step's cost", variants, "ms/image", device)
    images = torch.randint(0, 256, (16_384, 3, 32, 32), dtype=torch.uint8, device=device)
    generator = torch.Generator().manual_seed(0)
    variants = {}
    for n in (16_384, 2_048, 256):
        call = partial(augment.augment, images[:n], "pad", 2, 9, 1.0, None, generator)
        variants[f"{n:,} images in one call"] = (call, n)
    compare("(g) growth of the augmentation's cost", variants, "us/image", device)


def bench_overhead(device):
    """(h) What a step costs beside its arithmetic: twelve blocks with next to nothing in them."""
    images = torch.randn(2, 3, 32, 32, device=device)
    targets = torch.full((2, 10), 0.1, device=device)
    variants = {}
    for preset in ("deit", "strong"):
        config, vit_config = recipe.build_configs({**recipe.PRESETS[preset], "device": str(device)})
        small = replace(vit_config, patch_size=16, dim=24)
        compiled = machine.should_compile(None, device)
        state = optim.build_state(config, small, 10_000, device, compiled)
        state.model.train()
        step = partial(optim.train_step, state, images, targets, config)
        variants[f"`{preset}`: 2 images, depth 12, width 24, 4 patches"] = (step, 1)
    compare("(h) Python and launches: a step with hardly any arithmetic", variants, "ms", device)


def bench_laptop(device, half: torch.dtype):
    """(i) A step of the `laptop` network, against plain ViTs of its size with a class token."""
    config, vit_config = recipe.build_configs(recipe.PRESETS["laptop"])
    batch = config.batch_size
    images = torch.randn(batch, 3, 32, 32, device=device)
    targets = torch.full((batch, 10), 0.1, device=device)
    models = {
        "ours": VisionTransformer(vit_config),
        "ours, without the bias": VisionTransformer(
            replace(vit_config, relative_position_bias=False)
        ),
        **peers(vit_config),
    }
    variants = {
        name: (stepper(model.to(device).train(), images, targets, half), batch)
        for name, model in models.items()
    }
    model = VisionTransformer(vit_config).to(device)
    muon = Muon(optim.parameter_groups(model, config.weight_decay), lr=1e-4, fused=True)
    variants["ours, with Muon"] = (stepper(model, images, targets, half, muon), batch)
    title = f"(i) `laptop`: forward, backward and AdamW, {name_of(half)}, batch {batch}"
    compare(title, variants, "ms/image", device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure this program's pieces side by side.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--batch-size", type=int, help="of the steps (default: 1024 on a GPU, 32 on a CPU)")
    add("--compile", action="store_true", help="compile on a CPU, too (takes a minute)")
    args = parser.parse_args(argv)
    try:
        device = machine.pick_device(args.device)
        if args.batch_size is not None and args.batch_size < 4:
            raise ValueError(f"batch_size must be at least 4, got {args.batch_size}")
        compiling = machine.should_compile(args.compile or None, device)
    except ValueError as error:
        parser.error(str(error))
    machine.limit_threads()
    batch = args.batch_size or (32 if device.type == "cpu" else 1024)
    dtype = machine.pick_dtype("auto", device)
    facts = machine.versions(device)
    hardware = f"{facts['device']}, {torch.get_num_threads()} CPU threads"
    print(f"{hardware}, torch {facts['torch']}, commit {facts['commit']}")
    print(f"  {'':<58}{'median':>9} {'':<10}{'fastest .. slowest':>18}{'ratio':>8}")
    half = machine.pick_dtype("bfloat16", device)
    try:
        bench_pipeline()
        bench_models(batch, device, half, compiling)
        bench_epoch(batch, device, half)
        bench_scaling(batch, device, dtype)
        bench_overhead(device)
        bench_laptop(device, half)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        parser.error("out of memory: a smaller --batch-size needs less")
    return 0


if __name__ == "__main__":
    sys.exit(log.run_program(main))
