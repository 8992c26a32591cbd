"""
The recipe and the loop. Trains a Vision Transformer on CIFAR-10 from scratch, and never loses a run.

    python train.py                            300 epochs of DeiT-Ti on CIFAR-10; wants a GPU
    python train.py --preset demo              two minutes on two CPU cores, no download
    python train.py --resume                   continues the run in out/, to the same bits
    torchrun --nproc_per_node=4 train.py       the same run on four GPUs

    recipe -> data -> model -> [ augment an epoch -> train_step on every batch -> validate -> save ] x epochs -> test

The only writer of checkpoints. Validation images are held out of the training set and choose the checkpoint;
the test set is looked at once, at the end, by evaluate.py.
"""

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
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as nnF
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
from vit import VisionTransformer, ViTConfig

# --- the recipe: one field a knob, and the comment beside it is its line in --help ------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the documented recipe; ValueError for values that cannot work."""

    dataset: str = "cifar10"  # cifar10, cifar100, folder (of pictures) or shapes (drawn, no download)
    data_dir: str = "data"  # where the dataset lies, or is downloaded to
    download_url: str | None = None  # mirror of CIFAR's tarball; its md5 is checked all the same
    val_size: int = 5_000  # training images held out to choose the checkpoint, so that the test set need not
    out: str = "out"  # folder of the run: checkpoints, log.csv, metrics, pictures
    resume: bool = False  # continue the run in --out (start it if there is none yet)

    epochs: int = 300  # small data and strong augmentation need many passes (DeiT trains 300)
    batch_size: int = 1024  # images per step, over all GPUs
    lr: float = 1e-3  # peak learning rate; if only --batch-size is given, it scales in proportion (DeiT: 5e-4 x batch / 512)
    weight_decay: float = 0.05  # AdamW's, on matrices only: not on biases, norms, class token and positions
    pct_start: float = 0.3  # OneCycleLR: share of the steps in which the rate rises
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping

    randaugment_ops: int = 2  # RandAugment: operations per image
    randaugment_magnitude: int = 9  # RandAugment: strength, 0 to 30 (torchvision's scale; timm's 9 is 27 here)
    randaugment_prob: float = 1.0  # RandAugment: chance that a drawn operation is applied
    randaugment_fill: str = "black"  # RandAugment: colour of what comes in from outside, black or mean
    crop: str = "pad"  # pad (by 1/8 and cut), resized (80 to 100 % of the area) or none
    mixup: float = 1.0  # mixup's alpha; 0: off. Every batch draws mixup or cutmix
    cutmix: float = 1.0  # cutmix's alpha; 0: off
    mix_until: float = 1.0  # share of the epochs with mixing; the rest see unmixed images
    label_smoothing: float = 0.0  # share of the target spread over all classes
    ema_decay: float = 0.0  # moving average of the weights, validated and kept instead of them; 0: off

    eval_every: int = 1  # epochs between validations
    save_every: int = 1  # epochs between checkpoints (on Google Drive, every one of them counts against the quota)
    max_minutes: float | None = None  # end at an epoch boundary before this many minutes, after one epoch at least
    seed: int = 0  # of everything: split, weights, batches, augmentation, dropout
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto (bfloat16 or float16 on CUDA, float32 elsewhere), float32, bfloat16, float16
    compile: bool | None = None  # torch.compile; by default on CUDA only
    deterministic: bool = False  # the same bits again on a GPU too, at some cost in speed

    def __post_init__(self):
        for name, choices in {
            "dataset": ("cifar10", "cifar100", "folder", "shapes"),
            "crop": ("pad", "resized", "none"),
            "randaugment_fill": ("black", "mean"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f'{name} must be {", ".join(choices[:-1])} or {choices[-1]}, got "{getattr(self, name)}"')
        infinity = math.inf
        for name, low, high in (
            *((name, 1, infinity) for name in ("val_size", "epochs", "batch_size", "eval_every", "save_every")),
            *((name, 0, infinity) for name in ("weight_decay", "grad_clip", "mixup", "cutmix", "randaugment_ops")),
            *((name, 0, 1) for name in ("pct_start", "randaugment_prob", "mix_until", "label_smoothing", "ema_decay")),
            ("randaugment_magnitude", 0, 30),
            ("seed", 0, 2**32),
        ):
            if not (low <= getattr(self, name) <= high and math.isfinite(getattr(self, name))):
                limits = f"between {low} and {high}" if math.isfinite(high) else f"at least {low}"
                raise ValueError(f"{name} must be {limits}, got {getattr(self, name)}")
        for name in ("lr", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < infinity:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("pct_start", "label_smoothing", "ema_decay"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} must be below 1")
        if self.batch_size == 1 and (self.mixup or self.cutmix) and self.mix_until:
            raise ValueError("batch_size 1 leaves nothing to mix with: give a larger one, or --mixup 0 --cutmix 0")


PRESETS = {
    "deit": {},  # the defaults above
    "strong": {  # DeiT's own schedule at a smaller batch, timm-strength RandAugment, mixing that ends, averaged weights
        "batch_size": 256,
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
    "demo": {  # everything at work in two minutes on two CPU cores
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
SESSION = ("out", "resume", "max_minutes")  # of one sitting, not of the recipe: kept out of the checkpoint
MAY_CHANGE = ("data_dir", "download_url", "save_every", "device", "compile")  # what --resume may be given anew
WALL_CLOCK = ("images_per_second", "mfu", "seconds")  # what differs between two equal runs
COLUMNS = (
    *("epoch", "lr", "train_loss", "val_loss", "val_accuracy", "ema_accuracy", "train_accuracy"),
    *("grad_norm", "skipped_steps", *WALL_CLOCK),
)


def parse(argv: list[str] | None) -> tuple[dict, dict]:
    """The command line as (preset, flags): what the preset sets, and what was typed. ValueError for what is unknown."""
    parser = evaluate.Parser(description="Train a Vision Transformer from scratch.", epilog="README.md explains each.")
    parser.add_argument("--preset", choices=PRESETS, help="a set of values for the flags below (default: deit)")
    for config in (TrainConfig, ViTConfig):
        group = parser.add_argument_group(config.__name__)
        hints, source = get_type_hints(config), inspect.getsource(config)
        for field in fields(config):
            # The help is the comment in the source, so there is only one text to keep true.
            comment = re.search(rf"^    {field.name}: .*?# (.*)$", source, re.MULTILINE)
            text = f"{comment[1] if comment else ''} (default: {field.default})".replace("%", "%%")
            kind = next(t for t in (*get_args(hints[field.name]), hints[field.name]) if t is not type(None))
            flag = "--" + field.name.replace("_", "-")
            options = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
            if field.default is None and kind is bool:
                options = {"action": evaluate.argparse.BooleanOptionalAction}
            group.add_argument(flag, dest=field.name, help=text, **options, default=None)
    flags = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = PRESETS[flags.pop("preset")] if "preset" in flags else {}
    if "batch_size" in flags and "lr" not in flags:
        usual = {"lr": TrainConfig.lr, "batch_size": TrainConfig.batch_size, **preset}
        preset = {**preset, "lr": usual["lr"] * flags["batch_size"] / usual["batch_size"]}
    return preset, flags


def build_configs(values: dict, classes: list[str] | None = None) -> tuple[TrainConfig, ViTConfig]:
    """Both configs from one dictionary of values. Once the classes are known, the head takes their number."""
    known = {name: value for name, value in values.items() if name in ViTConfig.__dataclass_fields__}
    recipe = TrainConfig(**{name: value for name, value in values.items() if name not in known})
    if classes:
        if known.setdefault("num_classes", len(classes)) != len(classes):
            raise ValueError(f"num_classes is {known['num_classes']}, but the dataset has {len(classes)} classes")
    if known.get("in_channels", 3) != 3:
        raise ValueError(f"in_channels must be 3 for pictures, got {known['in_channels']}")
    return recipe, ViTConfig(**known)


# --- the pieces of a run ---------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that changes while training."""

    model: VisionTransformer
    forward: nn.Module  # the model as it is called: compiled, and wrapped for several processes
    ema: VisionTransformer | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # does nothing unless the dtype is float16
    dtype: torch.dtype


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 needs no loss scaling; CUDA GPUs before Ampere only emulate it, slowly, so they get float16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def can_compile(device: torch.device) -> bool:
    """torch.compile pays on CUDA; its code generator, Triton, needs a GPU of Volta's age or younger."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay pulls matrices towards zero. Biases, norms, class token and positions are no matrices: they set offsets."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and name not in ("cls_token", "pos_embed")
        (decayed if matrix else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def build_state(config: TrainConfig, vit_config: ViTConfig, steps: int, device: torch.device) -> State:
    """A fresh model with its optimizer and schedule, for a run of so many optimizer steps."""
    torch.manual_seed(config.seed)
    model = VisionTransformer(vit_config).to(device)
    optimizer = torch.optim.AdamW(
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
    compiled = config.compile if config.compile is not None else can_compile(device)
    forward = torch.compile(model) if compiled else model
    if dist.is_initialized():
        forward = nn.parallel.DistributedDataParallel(forward)
    return State(
        model=model,
        forward=forward,
        ema=copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        dtype=dtype,
    )


def epoch_seed(seed: int, epoch: int) -> int:
    """The randomness of an epoch is a function of (seed, epoch), so a resumed run needs no saved random state.

    Not seed + epoch: run 1 would then repeat run 0, an epoch ahead.
    """
    return seed * 1_000_003 + epoch


def epoch_batches(
    images: Tensor, labels: Tensor, mean: tuple, std: tuple, num_classes: int, config: TrainConfig, epoch: int
) -> DataLoader:
    """The batches of one epoch, (float32 (B, 3, H, W), targets (B, K)), from uint8 images and their labels."""
    generator = torch.Generator().manual_seed(epoch_seed(config.seed, epoch))
    mixing = epoch <= round(config.mix_until * config.epochs)
    mean_std = [torch.tensor(x, device=images.device) for x in (mean, std)]  # copied once, not every batch

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


def train_step(state: State, images: Tensor, targets: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """One optimizer step on images (B, 3, H, W) and soft targets (B, K). Returns the loss and the gradient norm.

    Both stay on the device: reading them here would make the CPU wait for the GPU in every step. With float16
    only, the scaler is asked whether the gradients overflowed; such a step is skipped, by the schedule too.
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


@torch.no_grad()
def update_ema(state: State, decay: float):
    """ema <- decay * ema + (1 - decay) * model, with a lower decay in the first steps, to forget the random start."""
    if state.ema is not None:
        step = state.scheduler.last_epoch  # optimizer steps taken so far
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this machine, the best of a few: the 100 % of the log's MFU."""
    n = 8192 if device.type != "cpu" else 256 if dtype == torch.float16 else 1024  # CPUs emulate it
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # item() waits until it is computed
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


# --- checkpoints: a run is never lost --------------------------------------------------------------------------------


def pack(state: State, **rest) -> dict:
    """Everything the next epoch depends on, as plain data that loads with weights_only=True."""
    return {
        "format": evaluate.FORMAT,
        "model": state.model.state_dict(),  # of the bare model: no prefixes from compiling or wrapping
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
    """log.csv, whole and anew each time, so that a kill leaves no torn row and a resumed run no double one."""
    rows = [",".join("" if row[name] is None else repr(row[name]) for name in COLUMNS) for row in history]
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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass that weights_only=True refuses
        "device": name,
    }


def check_out(config: TrainConfig) -> dict | None:
    """The checkpoint to resume from, or None for a fresh start. ValueError where a run would be lost or cannot be kept."""
    last, best = (os.path.join(config.out, name) for name in ("last.pt", "best.pt"))
    parent = os.path.abspath(config.out)
    while not os.path.lexists(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"cannot write to the output folder {config.out}: {parent} is not a folder that can be written to")
    if config.resume and os.path.exists(last):
        return evaluate.load_checkpoint(last)
    if os.path.exists(best) and config.resume:
        # best.pt is written just before last.pt: a kill between the two, in the first save, is the one honest way here.
        found = evaluate.load_checkpoint(best)
        if found["epoch"] > found["train"]["save_every"]:
            raise ValueError(f"{config.out} holds best.pt but no last.pt to resume from: choose another --out")
    elif os.path.exists(last) or os.path.exists(best):
        raise ValueError(f"{config.out} already holds a run: continue it with --resume, or choose another --out")
    return None


def resolve(preset: dict, flags: dict) -> tuple[dict, dict | None]:
    """(all values of the run, checkpoint or None). On resume the saved recipe wins; a flag that contradicts it is refused."""
    values = {**preset, **flags}
    config, _ = build_configs(values)
    checkpoint = check_out(config)
    if checkpoint:
        saved = {**checkpoint["train"], **checkpoint["vit"]}
        if "lr" not in flags and "batch_size" in flags:
            values.pop("lr")  # scaled to the batch for a new run; this one knows its own
        for name, value in values.items():
            if name in saved and name not in MAY_CHANGE and value != saved[name]:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value} contradicts the run in {config.out}, which has {saved[name]}: leave it out")
        values = {**saved, **{name: value for name, value in values.items() if name in (*SESSION, *MAY_CHANGE)}}
    return values, checkpoint


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What main() sets up and the loop works on."""

    config: TrainConfig
    vit_config: ViTConfig
    dataset: data.Dataset
    device: torch.device
    rank: int  # number of this process, of `world` processes; rank 0 writes and prints
    world: int
    train: tuple[Tensor, Tensor]  # uint8 images (N, 3, H, W) and int64 labels (N,), on the device, like val
    val: tuple[Tensor, Tensor]
    state: State
    epoch: int = 0  # epochs that are done
    best: dict | None = None  # {"epoch", "accuracy"} of the best validation so far
    best_weights: dict | None = None  # its weights, until the next save writes them into best.pt
    history: list[dict] | None = None  # one row of COLUMNS an epoch
    peak: float = math.nan  # FLOP/s, see measure_peak
    versions: dict | None = None  # found once: asking git again at every save would cost a process an epoch

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)


def prepare(preset: dict, flags: dict, rank: int, world: int) -> Run:
    """Everything up to the first step. Whatever the user can have got wrong is a ValueError or an OSError in here."""
    values, checkpoint = resolve(preset, flags)
    config, vit_config = build_configs(values)
    device = evaluate.pick_device(config.device)
    if config.device == "auto" and device.type == "cpu":
        work = config.epochs * 45_000 * 3 * vit_config.flops_per_image
        raise ValueError(
            f"no accelerator found. {config.epochs} epochs of 45,000 images are {work:.1e} floating-point operations: minutes "
            f"on a recent GPU, about {work / 1e11 / 86_400:.1f} days on a CPU at 100 GFLOP/s. See everything run in two "
            f"minutes with --preset demo, or start it here all the same with --device cpu"
        )
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} is not divisible by the {world} processes")
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
        dist.barrier()  # until rank 0 is past its own: the download and the decoded images are then in place
    dataset = data.load(config.dataset, config.data_dir, vit_config.image_size, config.download_url)
    if rank == 0 and world > 1:
        dist.barrier()
    config, vit_config = build_configs(values, dataset.classes)
    train_index, val_index = data.split(len(dataset.train_images), config.val_size, config.seed)
    if config.batch_size > len(train_index):
        raise ValueError(f"batch_size {config.batch_size} is more than the {len(train_index)} training images")
    train, val = (
        (dataset.train_images[index].to(device), dataset.train_labels[index].to(device))
        for index in (train_index, val_index)
    )
    steps = len(train_index) // config.batch_size * config.epochs
    state = build_state(config, vit_config, steps, device)
    run = Run(config, vit_config, dataset, device, rank, world, train, val, state, history=[])
    if checkpoint:
        data_now = (list(dataset.classes), dataset.mean, dataset.std, len(train_index))
        data_then = tuple(checkpoint[key] for key in ("classes", "mean", "std", "train_images"))
        if data_now != data_then:
            raise ValueError(f"the images of {config.data_dir} are not those the run in {config.out} was trained on")
        try:
            unpack(checkpoint, state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{config.out}/last.pt does not hold the whole state of a run ({error!r})") from None
        run.epoch, run.best, run.history = (checkpoint[key] for key in ("epoch", "best", "history"))
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        run.peak, run.versions = measure_peak(device, state.dtype) * world, versions(device)
        print_run(run, steps)
    return run


def print_model(config: ViTConfig):
    tokens = f"{config.num_patches} patches" + (" + class token" if config.pool == "cls" else "")
    print(
        f"model    {config.image_size}x{config.image_size} pixels, patch {config.patch_size}: {tokens} | dim {config.dim}, "
        f"depth {config.depth}, heads {config.heads} | {config.flops_per_image / 1e6:,.1f} MFLOP an image forward",
        flush=True,
    )


def print_run(run: Run, steps: int):
    """The rest of the lines before the first epoch."""
    config, state, K = run.config, run.state, len(run.dataset.classes)
    parameters = sum(p.numel() for p in state.model.parameters())
    print(
        f"data     {config.dataset}: {len(run.train[0]):,} training, {len(run.val[0]):,} validation, "
        f"{len(run.dataset.test_images):,} test images, {K} classes"
    )
    print(
        f"run      {parameters:,} parameters | {config.epochs} epochs, {steps:,} steps of {config.batch_size} images | "
        f"peak lr {config.lr:g}, weight decay {config.weight_decay:g} | seed {config.seed} | {config.out}/"
    )
    compiled = ", compiled" if state.forward is not state.model else ""
    facts = run.versions
    print(
        f"machine  {run.world} x {facts['device']}, {str(state.dtype)[6:]}{compiled} | torch {facts['torch']}, commit "
        f"{facts['commit']} | peak {run.peak / 1e12:.2f} TFLOP/s (measured), the 100 % of MFU"
    )
    if run.epoch:
        best = f", best so far {run.best['accuracy']:.2%}" if run.best else ""
        print(f"resumed  after epoch {run.epoch} of {config.epochs}{best}")
    else:
        loss, _ = validate(run, state.model, [part[:1_000] for part in run.val])
        print(f"start    loss {loss:.4f} before training; guessing among {K} classes costs ln({K}) = {math.log(K):.4f}")
    print(header(), flush=True)


def validate(run: Run, model: nn.Module, part) -> tuple[float, float]:
    """Loss and accuracy of a model on part = (images, labels), which are only normalised."""
    images, labels = part
    logits = evaluate.predict(model, images, run.dataset.mean, run.dataset.std, run.state.dtype)
    correct = (logits.argmax(1) == labels).sum()
    return nnF.cross_entropy(logits, labels).item(), correct.item() / len(labels)


def train_epoch(run: Run, epoch: int, announce: bool = False) -> dict:
    """All steps of one epoch. Returns its row of the log, without the validation. Diverged if a number is not finite.

    announce: say after three steps how long it all may take, if that is long.
    """
    config, state = run.config, run.state
    # Dropout and drop path draw from the global stream; its seed counts modulo 2^32.
    torch.manual_seed(epoch_seed(config.seed, epoch) + run.rank * 1_000_000_007)
    before, marks = state.scheduler.last_epoch, [time.perf_counter()]  # marks: the start, augmented, each step
    statistics = (run.dataset.mean, run.dataset.std, len(run.dataset.classes))
    batches = epoch_batches(*run.train, *statistics, config, epoch)
    marks.append(time.perf_counter())
    share = config.batch_size // run.world
    mine = slice(run.rank * share, (run.rank + 1) * share)  # every process makes the whole batch, and takes its rows
    state.model.train()
    results = []
    for step, (images, targets) in enumerate(tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=hide_bar(run)), 1):
        lr = state.scheduler.get_last_lr()[0]
        results.append(torch.stack(train_step(state, images[mine], targets[mine], config)))
        marks.append(time.perf_counter())
        if announce and step == 3 and run.device.type == "cpu":  # on a GPU an epoch takes seconds, and asking waits for it
            seconds, left = pace(marks, len(batches)), config.epochs - run.epoch
            if seconds > 60:
                run.say(f"about {show(seconds)} an epoch, {show(seconds * left)} for the {left} to go")
    results = torch.stack(results)  # (steps, 2): loss and gradient norm
    if run.world > 1:
        dist.all_reduce(results)
        results /= run.world
    losses, norms = results.cpu().double().unbind(1)  # here the CPU waits for the GPU, for the first time in this epoch
    seconds = time.perf_counter() - marks[0]
    taken = state.scheduler.last_epoch - before

    broken = ~losses.isfinite() if state.scaler.is_enabled() else ~(losses.isfinite() & norms.isfinite())
    if broken.any():
        step = broken.nonzero()[0].item()
        raise Diverged(
            f"epoch {epoch}, step {step + 1} of {len(batches)}: the loss is {losses[step]:g}, the gradient norm "
            f"{norms[step]:g}. A lower --lr or --grad-clip 1 may help"
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


def pace(marks: list[float], steps: int) -> float:
    """Seconds an epoch will take, from the clock before and after augmenting it and after each of three steps."""
    began, augmented, first, _, third = marks
    return augmented - began + (third - first) / 2 * steps  # without the first step, which warms up


def hide_bar(run: Run) -> bool:
    """A progress bar on a terminal only: in a notebook or a file it would be a flood of lines."""
    return run.rank != 0 or not sys.stderr.isatty()


def validate_epoch(run: Run, row: dict):
    """Fill in the validation columns of the row, and remember the weights if they are the best so far."""
    state = run.state
    row["val_loss"], row["val_accuracy"] = validate(run, state.forward, run.val)
    # Accuracy on augmented and mixed batches means nothing, so it is measured on clean training images.
    _, row["train_accuracy"] = validate(run, state.forward, [part[:2_000] for part in run.train])
    accuracy = row["val_accuracy"]
    if state.ema:
        _, row["ema_accuracy"] = validate(run, state.ema, run.val)
        accuracy = row["ema_accuracy"]
    if run.best is None or accuracy > run.best["accuracy"]:
        run.best = {"epoch": row["epoch"], "accuracy": accuracy}
        kept = pack(state)
        run.best_weights = copy.deepcopy({name: kept[name] for name in ("format", "model", "ema")})


def save(run: Run):
    """best.pt, last.pt, log.csv, in this order: killed in between, --resume makes the same files once more."""
    facts = {
        "epoch": run.epoch,
        "best": run.best,
        "history": run.history,
        "train": {name: value for name, value in asdict(run.config).items() if name not in SESSION},
        "vit": asdict(run.vit_config),
        "classes": list(run.dataset.classes),
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "train_images": len(run.train[0]),
        "versions": run.versions,
    }
    if run.best_weights:
        best = {**facts, **run.best_weights, "epoch": run.best["epoch"]}
        data.save_atomically(best, os.path.join(run.config.out, "best.pt"))
        run.best_weights = None
    data.save_atomically(pack(run.state, **facts), os.path.join(run.config.out, "last.pt"))
    write_log(os.path.join(run.config.out, "log.csv"), run.history)


def train(run: Run, began: float, argv: list[str] | None):
    """The epochs, and the one look at the test set when they are all done."""
    config, first, longest, out_of_time = run.config, run.epoch + 1, 0.0, False
    for epoch in range(first, config.epochs + 1):
        epoch_began = time.monotonic()
        row = train_epoch(run, epoch, announce=epoch == first)
        final = epoch == config.epochs
        if final or epoch % config.eval_every == 0:
            validate_epoch(run, row)
        row["seconds"] = time.monotonic() - epoch_began
        longest = max(longest, 1.1 * row["seconds"])
        if config.max_minutes:
            out_of_time = agree(run, time.monotonic() - began + longest > 60 * config.max_minutes)
        run.epoch = epoch
        run.history.append(row)
        if run.rank == 0 and (final or out_of_time or epoch % config.save_every == 0):
            save(run)
        run.say(line(row, row["seconds"] * (config.epochs - epoch)))
        if out_of_time and not final:
            run.say(f"out of time: {saved_in(config.out)}\ncontinue with: {command(argv, run.world)}")
            return
    if run.rank == 0:
        finish(run)


def agree(run: Run, decision: bool) -> bool:
    """Rank 0's decision, on all ranks: their clocks differ."""
    if run.world == 1:
        return decision
    decision = torch.tensor(float(decision), device=run.device)
    dist.broadcast(decision, src=0)
    return bool(decision)


def finish(run: Run):
    """Evaluate the best checkpoint on the test set, once in the life of a run."""
    out = run.config.out
    best = evaluate.load_checkpoint(os.path.join(out, "best.pt"))
    if evaluate.read_metrics(out).get("epoch") == best["epoch"]:
        run.say(f"the run in {out}/ is complete, and so is its evaluation")
        return
    write_log(os.path.join(out, "log.csv"), run.history)  # a kill just before it left it a row short
    run.say(f"\nbest epoch {best['epoch']}, validation accuracy {run.best['accuracy']:.2%}; now, once, the test set:")
    metrics = evaluate.evaluate(best, out, device=str(run.device), dataset=run.dataset)
    run.say(evaluate.describe(metrics))
    run.say(f"wrote metrics.json and pictures into {out}/; try python evaluate.py {out}/best.pt --images PICTURE")


class Stopped(BaseException):
    """Ctrl-C or SIGTERM. A BaseException, so that no `except Exception` on the way swallows it."""


class Diverged(Exception):
    """A loss or a gradient that is not a finite number."""


def stop(signum, frame):
    for number in (signal.SIGINT, signal.SIGTERM):  # once is enough: torchrun sends both
        signal.signal(number, signal.SIG_IGN)
    raise Stopped(signum)


def saved_in(out: str) -> str:
    """What is on the disk, read from the disk."""
    try:
        last = evaluate.load_checkpoint(os.path.join(out, "last.pt"))
    except (ValueError, OSError):
        return "no epoch is saved yet"
    return f"{out}/last.pt holds epoch {last['epoch']} of {last['train']['epochs']}"


def command(argv: list[str] | None, world: int = 1) -> str:
    """The command that continues this run."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    program = ["python", "train.py"] if world == 1 else ["torchrun", f"--nproc_per_node={world}", "train.py"]
    return shlex.join([*program, *words, "--resume"])


def show(seconds: float) -> str:
    """A duration: 12:34, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def header() -> str:
    return (
        f"{'epoch':>5} {'lr':>9} {'train loss':>11} {'val loss':>9} {'val acc':>8} {'ema acc':>8} {'train acc':>9} "
        f"{'|grad|':>7} {'skipped':>7} {'img/s':>8} {'MFU':>6} {'left':>8}"
    )


def line(row: dict, left: float) -> str:
    """One epoch in the columns of header()."""

    def percent(name):
        return "" if row[name] is None else f"{100 * row[name]:.2f}%"

    val_loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
    return (
        f"{row['epoch']:>5} {row['lr']:>9.2e} {row['train_loss']:>11.4f} {val_loss:>9} {percent('val_accuracy'):>8} "
        f"{percent('ema_accuracy'):>8} {percent('train_accuracy'):>9} {row['grad_norm']:>7.2f} {row['skipped_steps']:>7} "
        f"{row['images_per_second']:>8,.0f} {row['mfu']:>6.1%} {show(left):>8}"
    )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can mend, 130 and 143 for Ctrl-C and SIGTERM, 1 for a diverged loss."""
    began = time.monotonic()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    old_handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
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
            except RuntimeError:  # the other process has left first; all is written, so nothing has failed
                pass
        return 0
    except Stopped as signum:
        if rank == 0:
            name = signal.Signals(signum.args[0]).name
            print(f"stopped by {name}: {saved_in(out)}\ncontinue with: {command(argv, world)}", flush=True)
        return 128 + signum.args[0]
    except Diverged as error:
        if rank == 0:
            evaluate.fail(f"{error}. {saved_in(out)}")
        return 1
    except OSError as error:  # a full disk, a folder that is gone
        if rank == 0:
            evaluate.fail(f"{error}. {saved_in(out)}; continue with: {command(argv, world)}")
        return 2
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
