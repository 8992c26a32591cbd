"""
The recipe and the loop: trains a Vision Transformer on CIFAR-10 from scratch, and loses no run.

    python train.py                            300 epochs of DeiT-Ti on CIFAR-10; wants a GPU
    python train.py --preset demo              two minutes on two CPU cores, no download
    python train.py --resume                   continues the run in out/ (on a CPU to the same bits)
    torchrun --nproc_per_node=4 train.py       the same batches and schedule on four GPUs

    recipe -> data -> model -> [ augment -> train_step on every batch -> validate -> save ]
                             x epochs -> test

The only writer of checkpoints. Validation images are held out of the training set and choose the
checkpoint; the test set is looked at once, at the end, by evaluate.py.

Axes:  N images (tokens in vit.py)   B batch   H, W image height and width   K classes
"""

import argparse
import copy
import importlib.util
import inspect
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from typing import get_args

import torch
import torch.distributed as dist
import torch.nn.functional as nnF
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
from muon import Muon
from vit import VisionTransformer, ViTConfig

# --- the recipe: a field is a knob, and the comment beside it is its line in --help ---------------


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the documented recipe; ValueError for what cannot work."""

    dataset: str = "cifar10"  # cifar10, cifar100, folder (of pictures) or shapes (no download)
    data_dir: str = "data"  # where the dataset lies, or is downloaded to
    download_url: str | None = None  # mirror of CIFAR's tarball; its md5 is checked all the same
    val_size: int = 5_000  # training images held out to choose the checkpoint
    out: str = "out"  # folder of the run: checkpoints, log.csv, metrics, pictures
    resume: bool = False  # continue the run in --out (start it if there is none yet)

    epochs: int = 300  # little data and strong augmentation need many passes
    batch_size: int = 1024  # images per step, over all GPUs
    optimizer: str = "adamw"  # adamw, or muon: for the blocks' matrices, and adamw for the rest
    lr: float = 1e-3  # peak learning rate; scales with --batch-size unless it is given, too
    weight_decay: float = 0.05  # on matrices, not on biases, norms, class token and positions
    pct_start: float = 0.3  # OneCycleLR: share of the steps in which the rate rises
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping

    randaugment_ops: int = 2  # RandAugment: operations per image
    randaugment_magnitude: int = 9  # RandAugment: strength, 0 to 30 (timm's 9 is 27 here)
    randaugment_prob: float = 1.0  # RandAugment: chance that a drawn operation is applied
    randaugment_fill: str = "black"  # RandAugment: what comes in from outside, black or mean
    crop: str = "pad"  # pad (by 1/8 and cut), resized (80 to 100 % of the area) or none
    mixup: float = 1.0  # mixup's alpha; 0: off. Every batch draws mixup or cutmix
    cutmix: float = 1.0  # cutmix's alpha; 0: off
    mix_until: float = 1.0  # share of the epochs with mixing; the rest see unmixed images
    label_smoothing: float = 0.0  # share of the target spread over all classes
    ema_decay: float = 0.0  # moving average of the weights, used in their place; 0: off

    eval_every: int = 1  # epochs between validations
    save_every: int = 1  # epochs between checkpoints (and on a GPU ten seconds at least)
    max_minutes: float | None = None  # end at an epoch boundary before this many minutes
    seed: int = 0  # of everything: split, weights, batches, augmentation, dropout
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto (16 bits on CUDA, else float32), float32, bfloat16 or float16
    compile: bool | None = None  # torch.compile; by default on CUDA only
    deterministic: bool = False  # the same bits again on a GPU too, at some cost in speed

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f'{name} must be {known}, got "{getattr(self, name)}"')
        for words, holds, names in LIMITS:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name} must be {words}, got {value}")
        if self.batch_size == 1 and (self.mixup or self.cutmix) and self.mix_until:
            raise ValueError(
                "batch_size 1 leaves nothing to mix with: "
                "give a larger one, or --mixup 0 --cutmix 0"
            )


CHOICES = {
    "dataset": ("cifar10", "cifar100", "folder", "shapes"),
    "optimizer": ("adamw", "muon"),
    "crop": ("pad", "resized", "none"),
    "randaugment_fill": ("black", "mean"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
LIMITS = (  # in words, as a condition, and the fields it holds for
    ("at least 1", lambda x: 1 <= x < math.inf, "val_size epochs batch_size eval_every save_every"),
    ("at least 0", lambda x: 0 <= x < math.inf, "weight_decay grad_clip mixup cutmix"),
    ("at least 0", lambda x: 0 <= x < math.inf, "randaugment_ops"),
    ("positive", lambda x: 0 < x < math.inf, "lr max_minutes"),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "randaugment_prob mix_until"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "pct_start label_smoothing ema_decay"),
    ("between 0 and 30", lambda x: 0 <= x <= 30, "randaugment_magnitude"),
    ("at least 0 and below 2^32", lambda x: 0 <= x < 2**32, "seed"),
)

PRESETS = {
    "deit": {},  # the defaults above
    # for accuracy; the README's recipe table gives each value its reason and source
    "strong": {
        "batch_size": 256,
        "optimizer": "muon",
        "pct_start": 10 / 300,
        "grad_clip": 1.0,
        "randaugment_magnitude": 27,
        "randaugment_prob": 0.5,
        "randaugment_fill": "mean",
        "mixup": 0.8,
        "mix_until": 220 / 300,
        "label_smoothing": 0.1,
        "ema_decay": 0.9995,
        "pool": "mean",
        "dropout": 0.0,
        "drop_path": 0.1,
    },
    # everything at work in two minutes on two CPU cores
    "demo": {
        "dataset": "shapes",
        "device": "cpu",
        "val_size": 1_000,
        "epochs": 25,
        "batch_size": 50,
        "lr": 2e-3,
        "pct_start": 0.15,
        "grad_clip": 1.0,
        "randaugment_ops": 1,
        "mixup": 0.2,
        "mix_until": 0.4,
        "patch_size": 8,
        "dim": 64,
        "depth": 4,
        "heads": 4,
        "dropout": 0.0,
    },
}
# Of one sitting and not of the recipe: not in the checkpoint.
SESSION = ("out", "resume", "max_minutes")
# In the checkpoint, but --resume may be given another.
MAY_CHANGE = ("data_dir", "download_url", "save_every", "device", "compile")
SCREEN = (  # what an epoch prints: a name in log.csv, its title, width and format
    ("epoch", "epoch", 5, "d"),
    ("lr", "lr", 9, ".2e"),
    ("train_loss", "train loss", 11, ".4f"),
    ("val_loss", "val loss", 9, ".4f"),
    ("val_accuracy", "val acc", 8, ".2%"),
    ("ema_accuracy", "ema acc", 8, ".2%"),
    ("train_accuracy", "train acc", 9, ".2%"),
    ("grad_norm", "|grad|", 7, ".2f"),
    ("skipped_steps", "skipped", 7, "d"),
    ("images_per_second", "img/s", 8, ",.0f"),
    ("mfu", "MFU", 6, ".1%"),
)
COLUMNS = (*(name for name, *_ in SCREEN), "seconds")  # of log.csv


def show(seconds: float) -> str:
    """A duration: 12:34, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def header() -> str:
    return " ".join([*(f"{title:>{width}}" for _, title, width, _ in SCREEN), f"{'left':>8}"])


def line(row: dict, left: float) -> str:
    """One epoch, in the columns of header(); left: seconds to go."""
    cells = [
        f"{'' if row[name] is None else format(row[name], form):>{width}}"
        for name, _, width, form in SCREEN
    ]
    return " ".join([*cells, f"{show(left):>8}"])


def parse(argv: list[str] | None) -> tuple[dict, dict]:
    """The command line as (what the preset sets, what was typed). ValueError if unknown."""
    parser = evaluate.Parser(description="Train a Vision Transformer from scratch.")
    parser.add_argument("--preset", choices=PRESETS, help="sets flags below (default: deit)")
    for config in (TrainConfig, ViTConfig):
        group = parser.add_argument_group(config.__name__)
        source = inspect.getsource(config)
        for knob in fields(config):
            # The help is the comment in the source, so there is only one text to keep true.
            [comment] = re.findall(rf"^    {knob.name}: .*?# (.*)$", source, re.MULTILINE)
            kind, *_ = get_args(knob.type) or [knob.type]  # of `float | None`, float
            options = {"type": kind, "metavar": kind.__name__.upper()}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            text = f"{comment} (default: {knob.default})".replace("%", "%%")
            group.add_argument(f"--{knob.name.replace('_', '-')}", help=text, **options)
    typed = vars(parser.parse_args(argv))
    flags = {name: value for name, value in typed.items() if value is not None}
    preset = PRESETS[flags.pop("preset", "deit")]
    if "batch_size" in flags and "lr" not in flags:
        usual = {"lr": TrainConfig.lr, "batch_size": TrainConfig.batch_size, **preset}
        preset = {**preset, "lr": usual["lr"] * flags["batch_size"] / usual["batch_size"]}
    return preset, flags


def build_configs(values: dict, classes: list[str] | None = None) -> tuple[TrainConfig, ViTConfig]:
    """Both configs from one dictionary; num_classes follows the dataset, once it is known.

    ValueError for values that do not fit each other or the dataset.
    """
    for_model = ViTConfig.__dataclass_fields__
    vit = {name: value for name, value in values.items() if name in for_model}
    recipe = {name: value for name, value in values.items() if name not in for_model}
    if classes:
        K = vit.setdefault("num_classes", len(classes))
        if K != len(classes):
            raise ValueError(f"num_classes is {K}, but the dataset has {len(classes)} classes")
    if vit.get("in_channels", 3) != 3:
        raise ValueError(f"in_channels must be 3 for pictures, got {vit['in_channels']}")
    return TrainConfig(**recipe), ViTConfig(**vit)


# --- the pieces of a run --------------------------------------------------------------------------


@dataclass
class State:
    """What train_step works on."""

    model: VisionTransformer
    forward: nn.Module  # the model as training calls it: wrapped, where processes share the batch
    compiled: bool  # whether its blocks are
    ema: VisionTransformer | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # does nothing unless the dtype is float16
    dtype: torch.dtype


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for "auto" float32 on a CPU, on CUDA the 16-bit type the GPU has.

    bfloat16 needs no loss scaling, but GPUs before Ampere only emulate it, slowly.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def can_compile(device: torch.device) -> bool:
    """torch.compile pays on CUDA; its code generator, Triton, needs a GPU of Volta or younger."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def parameter_groups(model: VisionTransformer, weight_decay: float) -> list[dict]:
    """Decay pulls matrices towards zero. The rest (biases, norms, class token, positions) is free.

    The blocks' matrices come in groups of equal shape, which is how Muon wants them.
    """
    groups, rest = {}, []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in ("cls_token", "pos_embed") or name.endswith("bias_table"):
            rest.append(parameter)
        else:  # blocks.3.attn.qkv.weight joins the other blocks' attn.qkv.weight
            kind = re.sub(r"^blocks\.\d+\.", "blocks.", name)
            groups.setdefault(kind, []).append(parameter)
    decayed = [
        {"params": same, "weight_decay": weight_decay, "muon": kind.startswith("blocks.")}
        for kind, same in groups.items()
    ]
    return [*decayed, {"params": rest, "weight_decay": 0.0, "muon": False}]


def build_state(
    config: TrainConfig, vit_config: ViTConfig, steps: int, device: torch.device
) -> State:
    """A fresh model with its optimizer and schedule, for a run of so many optimizer steps."""
    torch.manual_seed(config.seed)
    model = VisionTransformer(vit_config).to(device)
    optimizer = {"adamw": torch.optim.AdamW, "muon": Muon}[config.optimizer](
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.999), fused=True
    )
    # A rise of exactly one step would make OneCycleLR divide by zero; it means no rise.
    pct_start = 0.0 if config.pct_start * steps == 1 else config.pct_start
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=steps,
        pct_start=pct_start,
        cycle_momentum=False,  # True, the default, would overwrite AdamW's beta1
    )
    dtype = pick_dtype(config.dtype, device)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
    compiled = config.compile if config.compile is not None else can_compile(device)
    if compiled:
        # The blocks, not the model: they are alike, so the compiler works once and not depth times.
        # dynamic=False: else the second batch size would make it compile for any, slower.
        for block in [*model.blocks, *(ema.blocks if ema else [])]:
            block.compile(dynamic=False)
    forward = model
    if dist.is_initialized():
        # The only buffers are DropPath's constants.
        forward = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return State(model, forward, compiled, ema, optimizer, scheduler, scaler, dtype)


def epoch_seed(seed: int, epoch: int) -> int:
    """All randomness of an epoch follows from (seed, epoch): a resumed run needs no saved streams.

    Not from seed + epoch: run 1 would then repeat run 0, an epoch ahead.
    """
    return seed * 1_000_003 + epoch


def epoch_batches(
    images: Tensor,
    labels: Tensor,
    mean: tuple,
    std: tuple,
    num_classes: int,
    config: TrainConfig,
    epoch: int,
) -> DataLoader:
    """The batches of an epoch, (float32 (B, 3, H, W), targets (B, K)), from uint8 (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(epoch_seed(config.seed, epoch))
    mixing = epoch <= round(config.mix_until * config.epochs)
    mean_std = [torch.tensor(x, device=images.device) for x in (mean, std)]  # copied only once

    def collate(images, labels):
        images = data.normalize(images, *mean_std)
        targets = data.soft_targets(labels, num_classes, config.label_smoothing)
        if mixing:
            images, targets = data.combine(images, targets, config.mixup, config.cutmix, generator)
        return images, targets

    fill = tuple(255 * m for m in mean) if config.randaugment_fill == "mean" else None
    policy = (config.randaugment_ops, config.randaugment_magnitude, config.randaugment_prob, fill)
    augmented = data.augment(images, config.crop, *policy, generator)
    return data.train_batches(augmented, labels, config.batch_size, collate, generator)


@torch.no_grad()
def update_ema(state: State, decay: float):
    """ema <- decay * ema + (1 - decay) * model; in the first steps less, to forget the start."""
    if state.ema is not None:
        step = state.scheduler.last_epoch  # optimizer steps taken so far
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(state.ema.parameters()), list(state.model.parameters()), 1 - decay
        )


def train_step(
    state: State, images: Tensor, targets: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """One optimizer step on images (B, 3, H, W), soft targets (B, K): its loss and gradient norm.

    Both stay on the device: reading them here would make the CPU wait for the GPU in every step.
    With float16 only, the scaler is asked whether the gradients overflowed; such a step is skipped,
    by the schedule too.
    """
    with torch.autocast(images.device.type, state.dtype, enabled=state.dtype != torch.float32):
        logits = state.forward(images)
    loss = nnF.cross_entropy(logits.float(), targets)
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)  # clip and report true gradients, not the scaled ones
    parameters = list(state.model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.scaler.get_scale() >= scale:  # it falls when, and only when, the step was skipped
        update_ema(state, config.ema_decay)
        state.scheduler.step()
    return loss.detach(), norm


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, the best of a few: the 100 % of the log's MFU."""
    n = 8192 if device.type != "cpu" else 256 if dtype == torch.float16 else 1024  # emulated there
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # item() waits until it is computed
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


# --- checkpoints: a run is never lost -------------------------------------------------------------


def pack(state: State, **rest) -> dict:
    """Everything the next epoch depends on, as plain data that loads with weights_only=True."""
    return {
        "format": evaluate.FORMAT,
        "model": state.model.state_dict(),  # the bare model's: no prefix from compiling, wrapping
        "ema": state.ema.state_dict() if state.ema else None,
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        **rest,
    }


def unpack(checkpoint: dict, state: State):
    """The inverse of pack. The model comes first: it alone checks shapes."""
    state.model.load_state_dict(checkpoint["model"])
    if state.ema:
        state.ema.load_state_dict(checkpoint["ema"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.scheduler.load_state_dict(checkpoint["scheduler"])
    if checkpoint["scaler"]:  # empty unless the dtype was float16; a run may move to another GPU
        state.scaler.load_state_dict(checkpoint["scaler"])


def write_log(path: str, history: list[dict]):
    """log.csv, whole each time: a kill leaves no torn row, and a resumed run no double one."""
    rows = [
        ",".join("" if row[name] is None else repr(row[name]) for name in COLUMNS)
        for row in history
    ]
    text = "\n".join([",".join(COLUMNS), *rows]) + "\n"
    data.save_atomically(text, path, write=data.write_text)


def versions(device: torch.device) -> dict:
    """What a number has to be traced to: commit, software, hardware."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    name = f"{device.type} ({platform.machine()})"
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass that weights_only=True refuses
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
    }


def check_out(config: TrainConfig) -> dict | None:
    """The checkpoint to resume from, or None for a fresh start.

    ValueError where a run would be lost or could not be kept.
    """
    out = config.out
    parent = os.path.abspath(out)
    while not os.path.lexists(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(
            f"cannot write to the output folder {out}: "
            f"{parent} is not a folder that can be written to"
        )
    names = ("last.pt", "best.pt", "metrics.json", "log.csv")
    found = [name for name in names if os.path.exists(os.path.join(out, name))]
    if found and not config.resume:
        raise ValueError(
            f"{out} already holds a run: continue it with --resume, or choose another --out"
        )
    if "last.pt" in found:
        return evaluate.load_checkpoint(os.path.join(out, "last.pt"))
    if found == ["best.pt"]:  # as a kill in the first save may leave it: it is written first
        checkpoint = evaluate.load_checkpoint(os.path.join(out, "best.pt"))
        if checkpoint["epoch"] <= checkpoint["train"]["save_every"]:
            return {**checkpoint, "epoch": 0}  # the run starts again, with its recipe
    if found:
        raise ValueError(
            f"{out} holds {found[0]} but no last.pt to resume from: choose another --out"
        )
    return None


def resolve(preset: dict, flags: dict) -> tuple[dict, dict | None]:
    """(all values of the run, checkpoint or None).

    On resume the saved recipe wins; ValueError for a flag that contradicts it.
    """
    values = {**preset, **flags}
    # Nothing else is checked yet: beside the saved recipe a flag may mean more than by itself.
    config = TrainConfig(**{name: flags[name] for name in SESSION if name in flags})
    checkpoint = check_out(config)
    if checkpoint is None:
        return values, None
    saved = {**checkpoint["train"], **checkpoint["vit"]}
    unknown = checkpoint["train"].keys() - TrainConfig.__dataclass_fields__.keys()
    if unknown:
        fields_ = ", ".join(sorted(unknown))
        raise ValueError(f"{config.out} was written by another version: unknown {fields_}")
    if "lr" not in flags and "batch_size" in flags:
        values.pop("lr")  # scaled to the batch for a new run; this one knows its own
    for name, value in values.items():
        if name in saved and name not in MAY_CHANGE and value != saved[name]:
            source = "" if name in flags else " of the --preset"
            raise ValueError(
                f"--{name.replace('_', '-')} {value}{source} contradicts the run in {config.out}, "
                f"which has {saved[name]}: leave it out"
            )
    free = {name: value for name, value in values.items() if name in (*SESSION, *MAY_CHANGE)}
    return {**saved, **free}, checkpoint if checkpoint["epoch"] else None


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What main() sets up and the loop works on."""

    config: TrainConfig
    vit_config: ViTConfig
    dataset: data.Dataset
    device: torch.device
    rank: int  # number of this process, of `world` processes; rank 0 writes and prints
    world: int
    train_set: tuple[Tensor, Tensor]  # uint8 images (N, 3, H, W), int64 labels (N,), on the device
    val_set: tuple[Tensor, Tensor]  # the same of the validation images
    state: State
    epoch: int = 0  # epochs that are done
    best: dict | None = None  # {"epoch", "accuracy"} of the best validation so far
    best_weights: dict | None = None  # its weights, until the next save writes them into best.pt
    history: list[dict] = field(default_factory=list)  # one row of COLUMNS an epoch
    peak: float = math.nan  # FLOP/s, see measure_peak
    versions: dict | None = None  # asked for once, not at every save

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)


def identity(checkpoint: dict) -> tuple:
    """What all checkpoints of a run have in common."""
    recipe = {k: v for k, v in checkpoint["train"].items() if k not in MAY_CHANGE}
    return recipe, checkpoint["vit"], checkpoint["fingerprint"]


def restore(run: Run, checkpoint: dict):
    """Put a run where its checkpoint left it. ValueError if that does not fit the data."""
    dataset, out = run.dataset, run.config.out
    data_now = (list(dataset.classes), dataset.mean, dataset.std, dataset.fingerprint)
    data_then = tuple(checkpoint[key] for key in ("classes", "mean", "std", "fingerprint"))
    if data_now != data_then:
        raise ValueError(
            f"the images of {run.config.data_dir} are not those the run in {out} was trained on"
        )
    try:
        unpack(checkpoint, run.state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{out}/last.pt does not hold a run's whole state ({error!r})") from None
    run.epoch, run.best, run.history = (checkpoint[key] for key in ("epoch", "best", "history"))
    path = os.path.join(out, "best.pt")
    if run.best and not os.path.exists(path) and run.epoch < run.config.epochs:
        run.say(f"warning: {path} is gone; the best of the epochs to come takes its place")
        run.best = None
    if run.best:
        best = evaluate.load_checkpoint(path)
        # It is written before last.pt, so a kill between the two leaves it an epoch ahead.
        if best["epoch"] > run.epoch:
            run.best = best["best"]
        if best["best"] != run.best or identity(best) != identity(checkpoint):
            raise ValueError(f"{out}/best.pt is not of the run in {out}/last.pt")


def print_model(config: ViTConfig):
    """The first line: it comes before the dataset is loaded."""
    size, token = config.image_size, " + class token" if config.pool == "cls" else ""
    print(
        f"model    {size}x{size} pixels, patch {config.patch_size}: {config.num_patches} patches"
        f"{token} | dim {config.dim}, depth {config.depth}, heads {config.heads} | "
        f"{config.flops_per_image / 1e6:,.1f} MFLOP an image forward",
        flush=True,
    )


def validate(run: Run, model: nn.Module, part) -> tuple[float, float]:
    """Mean loss and accuracy of a model on part = (uint8 (N, 3, H, W), int64 (N,)).

    The images are only normalised.
    """
    images, labels = part
    logits = evaluate.predict(model, images, run.dataset.mean, run.dataset.std, run.state.dtype)
    correct = (logits.argmax(1) == labels).sum()
    return nnF.cross_entropy(logits, labels).item(), correct.item() / len(labels)


def print_run(run: Run, steps: int):
    """The rest of the lines before the first epoch."""
    config, state, dataset, facts = run.config, run.state, run.dataset, run.versions
    parameters = sum(p.numel() for p in state.model.parameters())
    K = len(dataset.classes)
    print(
        f"data     {config.dataset}: {len(run.train_set[0]):,} training, {len(run.val_set[0]):,} "
        f"validation, {len(dataset.test_images):,} test images, {K} classes"
    )
    print(
        f"run      {parameters:,} parameters | {config.epochs} epochs, {steps:,} steps of "
        f"{config.batch_size} images | {config.optimizer}, peak lr {config.lr:g}, weight decay "
        f"{config.weight_decay:g} | seed {config.seed} | {config.out}/"
    )
    compiled = ", compiled" if state.compiled else ""
    print(
        f"machine  {run.world} x {facts['device']}, {str(state.dtype)[6:]}{compiled} | torch "
        f"{facts['torch']}, commit {facts['commit']} | peak {run.peak / 1e12:.2f} TFLOP/s "
        f"(measured), the 100 % of MFU"
    )
    if run.epoch:
        best = f", best so far {run.best['accuracy']:.2%}" if run.best else ""
        print(f"resumed  after epoch {run.epoch} of {config.epochs}{best}")
    else:
        loss, _ = validate(run, state.model, [part[:1_000] for part in run.val_set])
        print(
            f"start    loss {loss:.4f} before training; guessing among {K} classes costs "
            f"ln({K}) = {math.log(K):.4f}"
        )
    print(header(), flush=True)


def prepare(preset: dict, flags: dict, rank: int, world: int) -> Run:
    """Everything up to the first step.

    What the user can have got wrong is a ValueError or an OSError in here.
    """
    values, checkpoint = resolve(preset, flags)
    config, vit_config = build_configs(values)
    device = evaluate.pick_device(config.device)
    if config.device == "auto" and device.type == "cpu":
        work = config.epochs * 45_000 * 3 * vit_config.flops_per_image
        raise ValueError(
            f"no accelerator found. {config.epochs} epochs of CIFAR-10's 45,000 images are "
            f"{work:.1e} floating-point operations: minutes on a recent GPU, about "
            f"{work / 1e11 / 86_400:.1f} days on a CPU at 100 GFLOP/s. See everything run in two "
            f"minutes with --preset demo, or start it here all the same with --device cpu"
        )
    if config.batch_size % world:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by the {world} processes"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        wait = timedelta(hours=3)  # while rank 0 downloads, decodes or evaluates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)

    if rank == 0:
        print_model(vit_config)
    else:
        dist.barrier()  # until rank 0 is past its own: it downloads and decodes for all
    dataset = data.load(config.dataset, config.data_dir, vit_config.image_size, config.download_url)
    if rank == 0 and world > 1:
        dist.barrier()
    config, vit_config = build_configs(values, dataset.classes)
    train_index, val_index = data.split(len(dataset.train_images), config.val_size, config.seed)
    n = len(train_index)
    if config.batch_size > n:
        raise ValueError(f"batch_size {config.batch_size} is more than the {n} training images")
    train_set, val_set = (
        (dataset.train_images[index].to(device), dataset.train_labels[index].to(device))
        for index in (train_index, val_index)
    )
    steps = n // config.batch_size * config.epochs
    state = build_state(config, vit_config, steps, device)
    run = Run(config, vit_config, dataset, device, rank, world, train_set, val_set, state)
    if checkpoint:
        restore(run, checkpoint)
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        run.peak, run.versions = measure_peak(device, state.dtype) * world, versions(device)
        print_run(run, steps)
    return run


class Diverged(Exception):
    """A loss or a gradient that is not a finite number."""


def pace(marks: list[float], steps: int) -> float:
    """Seconds an epoch will take, from the clock: at its start, augmented, after three steps."""
    began, augmented, first, _, third = marks
    return augmented - began + (third - first) / 2 * steps  # without the first, which warms up


def train_epoch(run: Run, epoch: int, announce: bool = False) -> dict:
    """All steps of an epoch. Returns its row of the log, but for the validation's columns.

    announce: say after three steps how long it all may take, if that is long. Raises Diverged if a
    loss or a gradient is not finite.
    """
    config, state = run.config, run.state
    # Dropout and drop path draw from the global stream (a CPU's reads 32 bits of its seed).
    torch.manual_seed(epoch_seed(config.seed, epoch) + run.rank * 1_000_000_007)
    steps_before = state.scheduler.last_epoch
    marks = [time.perf_counter()]  # the start, then: augmented, each step
    statistics = (run.dataset.mean, run.dataset.std, len(run.dataset.classes))
    batches = epoch_batches(*run.train_set, *statistics, config, epoch)
    marks.append(time.perf_counter())
    share = config.batch_size // run.world
    mine = slice(run.rank * share, (run.rank + 1) * share)  # every process makes the whole batch
    state.model.train()
    results = []
    hidden = run.rank > 0 or None  # None: a bar on a terminal only; in a file it would be a flood
    for images, targets in tqdm(batches, f"epoch {epoch}", leave=False, disable=hidden):
        lr = state.scheduler.get_last_lr()[0]
        results.append(torch.stack(train_step(state, images[mine], targets[mine], config)))
        marks.append(time.perf_counter())
        # On a GPU an epoch takes seconds, and asking would wait for it.
        if announce and len(results) == 3 and run.device.type == "cpu":
            seconds, left = pace(marks, len(batches)), config.epochs - run.epoch
            if seconds > 60:
                run.say(f"about {show(seconds)} an epoch, {show(seconds * left)} for {left} to go")
    results = torch.stack(results)  # (steps, 2): loss and gradient norm
    if run.world > 1:
        dist.all_reduce(results)
        results /= run.world
    losses, norms = results.cpu().double().unbind(1)  # here the CPU waits for the GPU, at last
    seconds = time.perf_counter() - marks[0]
    taken = state.scheduler.last_epoch - steps_before

    finite = losses.isfinite() & (norms.isfinite() | state.scaler.is_enabled())
    if not finite.all():
        step = finite.int().argmin().item()
        raise Diverged(
            f"epoch {epoch}, step {step + 1} of {len(batches)}: the loss is {losses[step]:g}, "
            f"the gradient norm {norms[step]:g}. A lower --lr or --grad-clip 1 may help"
        )
    images_per_second = len(batches) * config.batch_size / seconds
    return dict.fromkeys(COLUMNS) | {
        "epoch": epoch,
        "lr": float(lr),
        "train_loss": losses.mean().item(),
        "grad_norm": norms[norms.isfinite()].mean().item() if taken else 0.0,
        "skipped_steps": len(batches) - taken,
        "images_per_second": images_per_second,
        "mfu": images_per_second * 3 * run.vit_config.flops_per_image / run.peak,
    }


def validate_epoch(run: Run, row: dict):
    """Fill in the validation's columns of the row, and keep the weights if they are the best."""
    state = run.state
    row["val_loss"], row["val_accuracy"] = validate(run, state.model, run.val_set)
    # Accuracy on augmented and mixed batches means nothing: it is measured on clean images.
    _, row["train_accuracy"] = validate(run, state.model, [part[:2_000] for part in run.train_set])
    accuracy = row["val_accuracy"]
    if state.ema:
        _, row["ema_accuracy"] = validate(run, state.ema, run.val_set)
        accuracy = row["ema_accuracy"]
    if run.best is None or accuracy > run.best["accuracy"]:
        run.best = {"epoch": row["epoch"], "accuracy": accuracy}
        kept = pack(state)
        run.best_weights = copy.deepcopy({name: kept[name] for name in ("format", "model", "ema")})


def save(run: Run):
    """best.pt, last.pt, log.csv, in this order: killed in between, --resume makes them again."""
    facts = {
        "epoch": run.epoch,
        "best": run.best,
        "history": run.history,
        "train": {name: value for name, value in asdict(run.config).items() if name not in SESSION},
        "vit": asdict(run.vit_config),
        "classes": list(run.dataset.classes),
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "fingerprint": run.dataset.fingerprint,
        "versions": run.versions,
    }
    if run.best_weights:
        best = {**facts, **run.best_weights, "epoch": run.best["epoch"]}
        data.save_atomically(best, os.path.join(run.config.out, "best.pt"))
        run.best_weights = None
    data.save_atomically(pack(run.state, **facts), os.path.join(run.config.out, "last.pt"))
    write_log(os.path.join(run.config.out, "log.csv"), run.history)


def save_pause(device: torch.device) -> float:
    """The fewest seconds between two checkpoints.

    An epoch of a fast GPU takes half a second, and saving it may take as long. So a kill there
    costs these seconds of work, and on a CPU no more than the epoch it came in.
    """
    return 0.0 if device.type == "cpu" else 10.0


def agree(run: Run, decision: bool) -> bool:
    """Rank 0's decision, on all ranks: their clocks differ."""
    if run.world == 1:
        return decision
    decision = torch.tensor(float(decision), device=run.device)
    dist.broadcast(decision, src=0)
    return bool(decision)


def saved_in(out: str) -> str:
    """What is on the disk, read from the disk."""
    try:
        last = evaluate.load_checkpoint(os.path.join(out, "last.pt"))
    except (ValueError, OSError):
        return "no epoch is saved yet"
    return f"{out}/last.pt holds epoch {last['epoch']} of {last['train']['epochs']}"


def command(argv: list[str] | None, world: int) -> str:
    """The command that continues this run."""
    script, *words = sys.argv if argv is None else ["train.py", *argv]
    words = [word for word in words if word != "--resume"]
    program = ["python"] if world == 1 else ["torchrun", f"--nproc_per_node={world}"]
    return shlex.join([*program, script, *words, "--resume"])


def finish(run: Run):
    """Evaluate the best checkpoint on the test set, once in the life of a run."""
    out = run.config.out
    best = evaluate.load_checkpoint(os.path.join(out, "best.pt"))
    seen = evaluate.read_metrics(out)  # a look on the way here is not the last one
    if (seen.get("epoch"), seen.get("epochs_trained")) == (best["epoch"], run.config.epochs):
        run.say(f"the run in {out}/ is complete, and so is its evaluation")
        return
    write_log(os.path.join(out, "log.csv"), run.history)  # a kill before it left it a row short
    chosen = f"best epoch {best['epoch']}, validation accuracy {run.best['accuracy']:.2%}"
    run.say(f"\n{chosen}; now, once, the test set:")
    metrics = evaluate.evaluate(best, out, device=str(run.device), dataset=run.dataset)
    run.say(evaluate.describe(metrics))
    run.say(
        f"wrote metrics.json and pictures into {out}/; try python evaluate.py {out}/best.pt "
        f"--images PICTURE"
    )


def train(run: Run, began: float, argv: list[str] | None):
    """The epochs, and the one look at the test set when they are all done."""
    config, first, out_of_time = run.config, run.epoch + 1, False
    longest, longest_save = 0.0, 0.0  # seconds, and a tenth to spare, since they vary
    saved, pause = -math.inf, save_pause(run.device)
    for epoch in range(first, config.epochs + 1):
        epoch_began = time.monotonic()
        row = train_epoch(run, epoch, announce=epoch == first)
        final = epoch == config.epochs
        if final or epoch % config.eval_every == 0:
            validate_epoch(run, row)
        row["seconds"] = time.monotonic() - epoch_began
        longest = max(longest, 1.1 * row["seconds"])
        if config.max_minutes:  # is there time for this save, another epoch, and its save?
            needed = longest_save + longest + longest_save
            over = time.monotonic() - began + needed > 60 * config.max_minutes
            out_of_time = agree(run, over)
        run.epoch = epoch
        run.history.append(row)
        due = epoch % config.save_every == 0 and time.monotonic() - saved >= pause
        if run.rank == 0 and (final or out_of_time or due):
            save_began = time.monotonic()
            save(run)
            saved = time.monotonic()
            longest_save = max(longest_save, 1.1 * (saved - save_began))
        run.say(line(row, row["seconds"] * (config.epochs - epoch)))
        if out_of_time and not final:
            run.say(f"out of time: {saved_in(config.out)}")
            run.say(f"continue with: {command(argv, run.world)}")
            return
    if run.rank == 0:
        finish(run)


class Stopped(BaseException):
    """Ctrl-C or SIGTERM. A BaseException, so that no `except Exception` on the way swallows it."""


def stop(signum, frame):
    for number in (signal.SIGINT, signal.SIGTERM):  # once is enough: torchrun sends both
        signal.signal(number, signal.SIG_IGN)
    raise Stopped(signum)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what the user can mend, 1 for a loss that diverged.

    130 and 143 for Ctrl-C and SIGTERM, as is the custom.
    """
    began = time.monotonic()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    signals = (signal.SIGINT, signal.SIGTERM)
    old_handlers = {number: signal.signal(number, stop) for number in signals}
    out = TrainConfig.out
    try:
        try:
            preset, flags = parse(argv)
            out = flags.get("out", out)
            run = prepare(preset, flags, rank, world)
        except (ValueError, OSError) as error:
            return evaluate.fail(error) if rank == 0 else 2
        train(run, began, argv)
        if world > 1:
            try:
                dist.barrier()  # rank 0 may still be evaluating
                dist.destroy_process_group()
            except RuntimeError:  # the other process left first; all is written, nothing failed
                pass
        return 0
    except Stopped as stopped:
        [number] = stopped.args
        if rank == 0:
            print(f"stopped by {signal.Signals(number).name}: {saved_in(out)}")
            print(f"continue with: {command(argv, world)}", flush=True)
        return 128 + number
    except Diverged as error:
        if rank == 0:
            evaluate.fail(f"{error}. {saved_in(out)}")
        return 1
    except OSError as error:  # a full disk, a folder that is gone
        if rank == 0:
            evaluate.fail(f"{error}. {saved_in(out)}; continue with: {command(argv, world)}")
        return 2
    except RuntimeError as error:  # torch has no type of its own for a CPU's
        if not re.search("out of memory|allocate memory|overflow", str(error), re.IGNORECASE):
            raise
        return evaluate.fail(
            f"out of memory: a smaller network or --batch-size needs less. {saved_in(out)}"
        )
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
