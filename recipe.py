"""
The recipe: every knob with its meaning, the presets, and the command line made from them.

    python train.py --preset laptop --epochs 50      a preset, and one knob turned by hand
    python train.py --help                           every knob

A knob is a field of TrainConfig (how to train) or ViTConfig (what to train). Its comment here is
its line in --help, and the comment above a group is a heading there, so there is one text to keep
true. What was typed wins over the preset, and the preset over the defaults, of which a few follow
the size of the data. A resumed run keeps its saved recipe, and a flag that contradicts it is
refused by name, but for those in MAY_CHANGE.
"""

import argparse
import inspect
import math
import os
import re
from dataclasses import dataclass, fields
from typing import get_args

from vit import ViTConfig

CHOICES = {
    "dataset": ("cifar10", "cifar100", "folder", "shapes"),
    "optimizer": ("adamw", "muon"),
    "crop": ("pad", "resized", "none"),
    "randaugment_fill": ("black", "mean"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the documented recipe; ValueError for what cannot work."""

    # data
    dataset: str = "cifar10"  # cifar10, cifar100, folder (of pictures) or shapes (no download)
    data_dir: str = "data"  # where the dataset lies, or is downloaded to
    download_url: str | None = None  # a mirror of CIFAR's tarball; its md5 is checked
    val_size: int | None = None  # images held out to choose the checkpoint (default: a tenth)

    # run
    out: str = "out"  # folder of the run: checkpoints, log.csv, metrics, pictures
    resume: bool = False  # continue the run in --out (start it if there is none yet)
    max_minutes: float | None = None  # end after an epoch, in time (but for the first and the test)
    eval_every: int = 1  # epochs between validations
    save_every: int = 1  # epochs between checkpoints (and on a GPU ten seconds at least)
    seed: int = 0  # of everything: split, weights, batches, augmentation, dropout
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto (16 bits on CUDA, else float32), float32, bfloat16 or float16
    compile: bool | None = None  # torch.compile (default: on CUDA, where it works)
    deterministic: bool = False  # the same bits again on a GPU too, at some cost in speed

    # optimization
    epochs: int = 300  # passes over the training images; 100 where they are fewer than 10,000
    batch_size: int = 1024  # images per step, over all GPUs; smaller where the images are few
    optimizer: str = "adamw"  # adamw, or muon: for the blocks' matrices, and adamw for the rest
    lr: float = 1e-3  # peak learning rate; unless given, scales with --batch-size down to 3e-4
    weight_decay: float = 0.05  # on matrices, not on biases, norms, class token and positions
    pct_start: float = 0.3  # OneCycleLR: share of the steps in which the rate rises
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    label_smoothing: float = 0.0  # share of the target spread over all classes
    ema_decay: float = 0.0  # moving average of the weights, used in their place; 0: off

    # augmentation
    crop: str = "pad"  # pad (by 1/8 and cut), resized (80 to 100 % of the area) or none
    randaugment_ops: int = 2  # RandAugment: operations per image
    randaugment_magnitude: int = 9  # RandAugment: strength, 0 to 30 (timm's 9 is 27 here)
    randaugment_prob: float = 1.0  # RandAugment: chance that a drawn operation is applied
    randaugment_fill: str = "black"  # RandAugment: for pixels from outside the image, black or mean
    mixup: float = 1.0  # mixup's alpha; 0: off
    cutmix: float = 1.0  # cutmix's alpha; 0: off. A batch is mixed by one of the two
    mix_prob: float = 1.0  # share of the batches that are mixed
    mix_until: float = 1.0  # share of the epochs with mixing; the rest see unmixed images

    def __post_init__(self):
        def check(is_right, expected: str, *names: str):
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_right(value):
                    raise ValueError(f"{name} must be {expected}, got {value}")

        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f'{name} must be {known}, got "{getattr(self, name)}"')
        sizes = ("val_size", "epochs", "batch_size", "eval_every", "save_every")
        amounts = ("weight_decay", "grad_clip", "mixup", "cutmix", "randaugment_ops")
        check(lambda x: 1 <= x < math.inf, "at least 1", *sizes)
        check(lambda x: 0 <= x < math.inf, "at least 0 and finite", *amounts)
        check(lambda x: 0 < x < math.inf, "positive and finite", "lr", "max_minutes")
        shares = ("randaugment_prob", "mix_prob", "mix_until")
        check(lambda x: 0 <= x <= 1, "between 0 and 1", *shares)
        parts = ("pct_start", "label_smoothing", "ema_decay")
        check(lambda x: 0 <= x < 1, "at least 0 and below 1", *parts)
        check(lambda x: 0 <= x <= 30, "between 0 and 30", "randaugment_magnitude")
        check(lambda x: 0 <= x < 2**32, "at least 0 and below 2^32", "seed")
        mixes = (self.mixup or self.cutmix) and self.mix_prob and self.mix_until
        if self.batch_size == 1 and mixes:
            raise ValueError(
                "batch_size 1 leaves nothing to mix with: "
                "give a larger one, or --mixup 0 --cutmix 0"
            )


PRESETS = {
    "deit": {},  # the defaults above
    # the same network size and epochs for accuracy on a GPU; the README's table has the reasons
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
    # for two CPU cores: small, and with a position bias that starts like a convolution
    "laptop": {
        "device": "cpu",
        "dtype": "bfloat16",
        "epochs": 75,
        "batch_size": 128,
        "optimizer": "muon",
        "lr": 3e-3,
        "pct_start": 0.1,
        "grad_clip": 1.0,
        "label_smoothing": 0.1,
        "randaugment_fill": "mean",
        "mixup": 0.0,
        "mix_prob": 0.5,
        "mix_until": 0.8,
        "eval_every": 5,
        "dim": 144,
        "depth": 6,
        "heads": 9,
        "mlp_ratio": 2.0,
        "dropout": 0.0,
        "pool": "mean",
        "relative_position_bias": True,
    },
    # the whole program in two to four minutes on two CPU cores
    "demo": {
        "dataset": "shapes",
        "device": "cpu",
        "epochs": 25,
        "batch_size": 50,
        "optimizer": "muon",
        "lr": 5e-3,
        "pct_start": 0.15,
        "grad_clip": 1.0,
        "crop": "none",
        "randaugment_ops": 1,
        "randaugment_fill": "mean",
        "mixup": 0.2,
        "cutmix": 0.0,
        "mix_until": 0.4,
        "patch_size": 8,
        "dim": 64,
        "depth": 4,
        "heads": 4,
        "dropout": 0.0,
    },
}
# Where this process runs and for how long: not in the checkpoint.
SESSION = ("out", "resume", "max_minutes")
# In the checkpoint, but --resume may be given another.
MAY_CHANGE = (
    *("data_dir", "download_url", "save_every", "device", "compile"),  # where things are, and how
    *("lr", "grad_clip", "dtype"),  # what may rescue a run that diverged
)


def make_parser() -> argparse.ArgumentParser:
    """A flag for every knob. Its `error` prints one line and exits with code 2."""
    parser = argparse.ArgumentParser(
        description="Train a Vision Transformer from scratch.",
        usage=argparse.SUPPRESS,  # it would list all flags, before every error, too
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=PRESETS, help="sets flags below (default: deit)")
    for config, heading in ((TrainConfig, None), (ViTConfig, "network")):
        knobs = {knob.name: knob for knob in fields(config)}
        group = parser.add_argument_group(heading) if heading else parser
        for line in inspect.getsource(config).splitlines():
            if found := re.fullmatch(r"    # (.+)", line):
                group = parser.add_argument_group(found[1])
            found = re.fullmatch(r"    (\w+): .*?# (.+)", line)
            # Pictures have three channels, and the number of classes comes from the dataset.
            if not found or found[1] in ("in_channels", "num_classes"):
                continue
            knob = knobs[found[1]]
            kind, *_ = get_args(knob.type) or (knob.type,)  # of `float | None`, float
            read = os.path.expanduser if kind is str else kind  # shells leave --out=~/x as it is
            options = {"type": read, "metavar": kind.__name__.upper()}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            default = "" if knob.default is None else f" (default: {knob.default})"
            text = (found[2] + default).replace("%", "%%")
            group.add_argument(f"--{knob.name.replace('_', '-')}", help=text, **options)
    return parser


def parse(argv: list[str] | None, parser: argparse.ArgumentParser) -> tuple[dict, dict]:
    """The command line as (what the preset sets, what was typed)."""
    typed = vars(parser.parse_args(argv))
    flags = {name: value for name, value in typed.items() if value is not None}
    for name, value in flags.items():
        if isinstance(value, int) and value > 2**32:  # no size can be, and torch would overflow
            parser.error(f"argument --{name.replace('_', '-')}: too large")
    return PRESETS[flags.pop("preset", "deit")], flags


def resolve(preset: dict, flags: dict, saved: dict | None) -> dict:
    """The values of a run: what was typed, then the preset; on resume the saved recipe wins.

    saved: all values of the run to go on with, or None. ValueError for a flag that contradicts it.
    """
    if saved is None:
        values = {**preset, **flags}
        if "batch_size" in flags and "lr" not in flags:
            values["lr"] = scaled_lr(preset, flags["batch_size"])
        return values
    knobs = {knob.name: knob.default for c in (TrainConfig, ViTConfig) for knob in fields(c)}
    if unknown := sorted(saved.keys() - knobs.keys()):
        raise ValueError(
            f"the run to resume is of another version of this program: it has {', '.join(unknown)}"
        )
    saved = {**knobs, **saved}  # a knob that is younger than the run was at its default
    for name, value in {**preset, **flags}.items():
        if name not in (*SESSION, *MAY_CHANGE) and value != saved[name]:
            source = "" if name in flags else " of the --preset"
            why = ""
            if name == "epochs":
                why = " (its learning rate ends with the last epoch: train longer in a new --out)"
            raise ValueError(
                f"--{name.replace('_', '-')} {value}{source} contradicts the run to resume, "
                f"which has {saved[name]}: leave it out{why}"
            )
    free = {name: flags[name] for name in (*SESSION, *MAY_CHANGE) if name in flags}
    return {**saved, **free}


def scaled_lr(preset: dict, batch_size: int) -> float:
    """The preset's rate for another batch size: in proportion to it (DeiT, section 6).

    Not below 3e-4: at less, the few steps of a handful of pictures would hardly move the weights.
    """
    usual = {"lr": TrainConfig.lr, "batch_size": TrainConfig.batch_size, **preset}
    return max(usual["lr"] * batch_size / usual["batch_size"], min(usual["lr"], 3e-4))


def follow_data(values: dict, n: int, n_val: int = 0) -> dict:
    """Values for what is neither typed nor in the preset, from the n training images.

    A tenth is held out (of a few, 20 images or a quarter), unless the dataset brings n_val
    validation images of its own. The batch is the largest power of two, from 8 to 1024, with 32
    steps an epoch. Fewer than 10,000 images to train on are shown 100 times.
    """
    values = dict(values)
    if n_val and values.get("val_size") not in (None, n_val):
        raise ValueError(
            f"val_size is {values['val_size']}, but the data bring {n_val} validation images of "
            f"their own: leave it out"
        )
    if values.get("val_size") is None:
        values["val_size"] = n_val or max(n // 10, min(n // 4, 20), 1)
    rest = n if n_val else n - values["val_size"]
    if "batch_size" not in values and rest > 0:
        largest = min(max(8, rest // 32), TrainConfig.batch_size)
        values["batch_size"] = min(2 ** (largest.bit_length() - 1), rest)
        values.setdefault("lr", scaled_lr({}, values["batch_size"]))
    if rest < 10_000:
        values.setdefault("epochs", 100)
    return values


def build_configs(values: dict, num_classes: int | None = None) -> tuple[TrainConfig, ViTConfig]:
    """Both configs from one dictionary. ValueError for values that do not fit each other."""
    for_model = {knob.name for knob in fields(ViTConfig)}
    vit = {name: value for name, value in values.items() if name in for_model}
    recipe = {name: value for name, value in values.items() if name not in for_model}
    if num_classes:
        vit["num_classes"] = num_classes
    return TrainConfig(**recipe), ViTConfig(**vit)


def refuse_hours(config: TrainConfig, vit_config: ViTConfig, device: str, n: int, done: int = 0):
    """ValueError where all epochs of n images would take more than an hour on a CPU that nobody
    asked for (however soon --max-minutes ends a part of them).

    device: "cpu", or an accelerator's type. done: epochs that need not be run again.
    """
    epochs = config.epochs - done
    work = epochs * n * 3 * vit_config.flops_per_image
    hours = work / 1e11 / 3600
    if config.device == "auto" and device == "cpu" and hours > 1:
        long = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
        raise ValueError(
            f"no accelerator found. {epochs} epochs of {n:,} images are {work:.1e} "
            f"floating-point operations: about {long} on a CPU at 100 GFLOP/s. See everything run "
            f"in a few minutes with --preset demo, train the smaller network of --preset laptop "
            f"(2.5 to 9 hours for CIFAR-10), or start it here all the same with --device cpu"
        )
