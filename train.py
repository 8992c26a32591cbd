"""
The loop: trains a Vision Transformer on CIFAR-10 from scratch, and loses no run.

    python train.py                            300 epochs of DeiT-Ti on CIFAR-10; wants a GPU
    python train.py --preset demo              two to four minutes on two CPU cores, no download
    python train.py --resume                   continues the run in out/ (on a CPU to the same bits)
    torchrun --nproc_per_node=4 train.py       the same batches and schedule on four GPUs

    recipe -> data -> model -> [ augment -> train_step on every batch -> validate -> save ]
                             x epochs -> test

Validation images are held out of the training set and choose the checkpoint; the test set is
looked at once, at the end, by evaluate.py.

Axes:  N images (tokens in vit.py)   B batch   H, W image height and width   K classes
"""

import contextlib
import copy
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import augment
import checkpoint
import data
import evaluate
import log
import machine
import optim
import pictures
import plots
import recipe
from recipe import TrainConfig
from vit import ViTConfig

# --- an epoch -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What prepare() sets up and the loop works on."""

    config: TrainConfig
    vit_config: ViTConfig
    dataset: data.Dataset
    device: torch.device
    rank: int  # number of this process, of `world` processes; rank 0 writes and prints
    world: int
    train_set: tuple[Tensor, Tensor]  # uint8 images (N, 3, H, W), int64 labels (N,), on the device
    val_set: tuple[Tensor, Tensor]  # the same of the validation images
    state: optim.State
    fingerprint: str  # of the images to train and validate on
    peak: float = math.nan  # FLOP/s, see machine.measure_peak
    versions: dict | None = None  # asked for once, not at every save
    epoch: int = 0  # epochs that are done
    best: dict | None = None  # {"epoch", "accuracy", "model": weights} of the best validation
    history: list[dict] = field(default_factory=list)  # a row of log.csv an epoch
    written: dict = field(default_factory=dict)  # what this process has derived from last.pt

    @property
    def unused(self) -> tuple:
        """The columns of the log that this run has no use for."""
        used = {"ema_accuracy": self.state.ema, "skipped_steps": self.state.scaler.is_enabled()}
        return tuple(name for name in used if not used[name])

    def path(self, name: str) -> str:
        return os.path.join(self.config.out, name)


class Diverged(Exception):
    """A loss, a gradient or a weight is not a finite number."""


def train_epoch(run: Run, epoch: int) -> dict:
    """All steps of an epoch. Returns its row of the log, without the validation columns.

    Raises Diverged if a loss, a gradient or, in the end, a weight is not finite.
    """
    config, state, began = run.config, run.state, time.perf_counter()
    steps, taken_before = len(run.train_set[0]) // config.batch_size, state.scheduler.last_epoch
    # Dropout and drop path draw from the global stream, a different one on every rank. (The ranks'
    # seeds are a large odd number apart, as a CPU's generator reads only the last 32 bits.)
    torch.manual_seed(augment.epoch_seed(config.seed, epoch) + run.rank * 1_000_000_007)

    # one step on every batch; of several processes each makes the whole batch and takes its share
    dataset, share = run.dataset, config.batch_size // run.world
    mine = slice(run.rank * share, (run.rank + 1) * share)
    batches = augment.epoch_batches(
        *run.train_set, dataset.mean, dataset.std, len(dataset.classes), config, epoch
    )
    no_bar = True if run.rank or sys.stderr is None else None  # None: unless it is a terminal
    bar = tqdm(batches, f"epoch {epoch}", total=steps, leave=False, disable=no_bar)
    state.model.train()
    results = []
    for images, targets in bar:
        lr = state.optimizer.param_groups[0]["lr"]
        results.append(torch.stack(optim.train_step(state, images[mine], targets[mine], config)))

    # the losses, read once an epoch: reading makes the CPU wait for the GPU
    weight_norm = torch.nn.utils.get_total_norm(list(state.model.parameters()))
    results = torch.stack(results)  # (steps, 2): loss and gradient norm
    if run.world > 1:
        with machine.together():
            dist.all_reduce(results)
        results /= run.world
    losses, norms = results.cpu().double().unbind(1)
    seconds = time.perf_counter() - began

    finite = losses.isfinite() & (norms.isfinite() | state.scaler.is_enabled())
    if not finite.all():
        step = finite.int().argmin().item()
        raise Diverged(
            f"epoch {epoch}, step {step + 1} of {steps}: the loss is {losses[step]:g}, "
            f"the gradient norm {norms[step]:g}"
        )
    if not weight_norm.isfinite():
        raise Diverged(f"epoch {epoch}: the norm of the weights is {weight_norm:g}")
    taken = state.scheduler.last_epoch - taken_before
    if not taken and state.scaler.get_scale() < 1:  # float16's; each skipped step halves it
        raise Diverged(f"epoch {epoch}: the gradients overflow, however small the loss scale")
    images_per_second = steps * config.batch_size / seconds
    return dict.fromkeys(log.NAMES) | {
        "epoch": epoch,
        "lr": lr,
        "train_loss": losses.mean().item(),
        "grad_norm": norms[norms.isfinite()].mean().item() if taken else 0.0,
        "skipped_steps": steps - taken,
        "images_per_second": images_per_second,
        "mfu": images_per_second * 3 * run.vit_config.flops_per_image / run.peak,
    }


def validate(run: Run, model, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean loss and accuracy on part = (uint8 (N, 3, H, W), int64 (N,)), only normalised."""
    images, labels = part
    dataset, dtype = run.dataset, run.state.dtype
    logits = evaluate.compute_logits(model, images, dataset.mean, dataset.std, dtype)
    correct = (logits.argmax(1) == labels).sum()
    return F.cross_entropy(logits, labels).item(), correct.item() / len(labels)


def validate_epoch(run: Run, row: dict):
    """Fill in the validation's columns of the row, and keep the weights if they are the best."""
    state = run.state
    row["val_loss"], row["val_accuracy"] = validate(run, state.model, run.val_set)
    if not math.isfinite(row["val_loss"]):
        raise Diverged(f"epoch {row['epoch']}: the validation loss is {row['val_loss']:g}")
    # Accuracy on augmented and mixed batches means nothing: it is measured on clean images.
    _, row["train_accuracy"] = validate(run, state.model, [x[:2_000] for x in run.train_set])
    accuracy = row["val_accuracy"]
    if state.ema:
        _, row["ema_accuracy"] = validate(run, state.ema, run.val_set)
        accuracy = row["ema_accuracy"]
    if run.best is None or accuracy > run.best["accuracy"]:
        weights = copy.deepcopy((state.ema or state.model).state_dict())
        run.best = {"epoch": row["epoch"], "accuracy": accuracy, "model": weights}


# --- a run ----------------------------------------------------------------------------------------


def prepare(preset: dict, flags: dict, rank: int, world: int) -> Run:
    """Everything up to the first step.

    Whatever the user got wrong raises a ValueError or an OSError here.
    """
    # the recipe: what was typed, or on resume what was saved
    out = flags.get("out", TrainConfig.out)
    last = checkpoint.check_out(out, flags.get("resume", False))
    saved = {**last["train"], **last["vit"]} if last else None
    values = recipe.resolve(preset, flags, saved)
    config, vit_config = recipe.build_configs(values)
    if not last and config.dataset == "folder":
        pictures.refuse_inside(out, config.data_dir)

    # the device
    device = machine.pick_device(config.device)
    machine.limit_threads()
    done = last["epoch"] if last else 0
    if config.dataset in data.CIFAR_STATISTICS:  # before a download
        likely, _ = recipe.build_configs(recipe.follow_data(values, 50_000))
        recipe.refuse_hours(likely, vit_config, device.type, 50_000 - likely.val_size, done)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
    if world > 1:
        device = machine.join_processes(device, world)

    # the data; rank 0 first, as it downloads and decodes for all
    if rank == 0:
        print(log.describe_model(vit_config), flush=True)
    else:
        with machine.together():
            dist.barrier()
    source = (config.dataset, config.data_dir, vit_config.image_size, config.download_url)
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else None):
        dataset = data.load(*source)
    fingerprint = dataset.fingerprint
    if last:
        refuse_other_data(last, dataset, fingerprint, config)
        # another kind of CPU may sum the same pixels to another last digit
        dataset = replace(dataset, mean=last["mean"], std=last["std"])
    if rank == 0 and world > 1:
        with machine.together():
            dist.barrier()
    if last is None:
        n_val = 0 if dataset.val_images is None else len(dataset.val_images)
        values = recipe.follow_data(values, len(dataset.train_images), n_val)
    config, vit_config = recipe.build_configs(values, len(dataset.classes))
    train_set, val_set = data.hold_out(dataset, config.val_size, config.seed)
    # on two machines, with two disks, commands or kinds of GPU, say
    same = replace(config, out="", data_dir="", device="")
    if not machine.all_see((done, fingerprint, vit_config, same), world):
        raise ValueError(
            "the processes see different runs, flags or images: --out must lie on a disk "
            "that all of them share, and --data-dir had better, too"
        )
    if not machine.all_see(machine.pick_dtype(config.dtype, device), world):
        raise ValueError(
            "the processes' devices compute in different dtypes: give --dtype float32 "
            "(or, to GPUs, float16)"
        )
    dataset = replace(dataset, train_images=torch.empty(0))  # split, they need not be kept twice
    n = len(train_set[0])
    recipe.refuse_hours(config, vit_config, device.type, n, done)
    if config.batch_size > n:
        raise ValueError(f"batch_size {config.batch_size} is more than the {n} training images")
    if config.batch_size % world:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by the {world} processes"
        )
    train_set, val_set = (tuple(x.to(device) for x in part) for part in (train_set, val_set))

    # the model, its optimizer and its schedule
    steps = n // config.batch_size * config.epochs
    compiled = machine.should_compile(config.compile, device)
    state = optim.build_state(config, vit_config, steps, device, compiled)
    run = Run(
        config, vit_config, dataset, device, rank, world, train_set, val_set, state, fingerprint
    )
    if last:
        restore(run, last)
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        run.peak = machine.measure_peak(device, state.dtype) * world
        run.versions = machine.versions(device)
        print(log.describe_run(run, steps))
        loss = None if last else validate(run, state.model, [x[:1_000] for x in val_set])[0]
        print(log.describe_start(run, loss))
        print(log.header(run.unused), flush=True)
    return run


def refuse_other_data(last: dict, dataset: data.Dataset, fingerprint: str, config: TrainConfig):
    """ValueError for a dataset on which the run to resume was not trained."""
    if (list(dataset.classes), fingerprint) != (last["classes"], last["fingerprint"]):
        where = f"the images of {config.data_dir}"
        if config.dataset == "shapes":
            where = "the shapes that this machine draws"
        raise ValueError(f"{where} are not those the run in {config.out} was trained on")


def restore(run: Run, last: dict):
    """Put a run where its checkpoint left it. ValueError if that lacks a part."""
    try:
        run.state.load_state_dict(last)
        run.epoch, run.best, run.history = (last[key] for key in ("epoch", "best", "history"))
        if run.best:
            checkpoint.best_of(last)  # a KeyError where best.pt could not be derived from it
        if run.config.lr != last["train"]["lr"]:
            optim.change_lr(run.state, run.config.lr / last["train"]["lr"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        path = run.path("last.pt")
        raise ValueError(f"{path} does not hold a run's whole state ({error!r})") from None


def snapshot(run: Run) -> dict:
    """The whole truth of a run at an epoch's end, as last.pt holds it."""
    return {
        "format": checkpoint.FORMAT,
        "epoch": run.epoch,
        "best": run.best,
        "history": run.history,
        "train": {k: v for k, v in asdict(run.config).items() if k not in recipe.SESSION},
        "vit": asdict(run.vit_config),
        "classes": list(run.dataset.classes),
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "fingerprint": run.fingerprint,
        "versions": run.versions,
        **run.state.state_dict(),
    }


def save(run: Run):
    """last.pt first: after a kill in between, the resumed run derives the rest from it again."""
    whole = snapshot(run)
    checkpoint.save_checkpoint(whole, run.path("last.pt"))
    derive(run, whole)


def derive(run: Run, whole: dict):
    """What follows from last.pt: best.pt, log.csv and, once a minute, curves.png."""
    if run.best and run.written.get("best.pt") != run.best["epoch"]:
        checkpoint.save_checkpoint(checkpoint.best_of(whole), run.path("best.pt"))
        run.written["best.pt"] = run.best["epoch"]
    try:
        log.write_log(run.path("log.csv"), run.history)
    except PermissionError as error:  # Windows, while a spreadsheet shows it
        print(f"warning: {error}", file=sys.stderr)
    now = time.monotonic()
    if now - run.written.get("curves.png", -math.inf) > 60:
        title = plots.title_of(run.config.dataset, run.config.data_dir)
        plots.draw(plots.plot_curves, run.path("curves.png"), run.history, title)
        run.written["curves.png"] = now


def save_pause(device: torch.device) -> float:
    """The fewest seconds between two checkpoints.

    An epoch of a fast GPU takes half a second, and saving it may take as long. So (with
    --save-every 1) a kill there costs these seconds and an epoch of work, and on a CPU no more than
    the epoch it came in.
    """
    return 0.0 if device.type == "cpu" else 10.0


def train(run: Run, began: float, argv: list[str] | None):
    """The epochs, and the one look at the test set when they are all done."""
    config = run.config
    seconds, longest_save = [], 0.0
    last_save, out_of_time = -math.inf, False
    for epoch in range(run.epoch + 1, config.epochs + 1):
        # train, then validate
        epoch_began = time.monotonic()
        row = train_epoch(run, epoch)
        is_last = epoch == config.epochs
        if is_last or epoch % config.eval_every == 0:
            validate_epoch(run, row)
        row["seconds"] = time.monotonic() - epoch_began
        seconds.append(row["seconds"])
        usual = seconds[1:] or seconds  # in the first epoch torch.compile is at work
        run.epoch = epoch
        run.history.append(row)

        # is there time for this save, another epoch and its save? A fifth to spare, as they vary,
        # and as the first one with a validation takes longer than those before it
        if config.max_minutes:
            needed = 1.2 * (longest_save + max(usual) + longest_save)
            over = time.monotonic() - began + needed > 60 * config.max_minutes
            out_of_time = machine.rank_0_decides(over, run.world, run.device)

        # save
        rested = time.monotonic() - last_save >= save_pause(run.device)
        untimed = config.max_minutes and not longest_save  # the first tells how long they take
        is_due = (epoch % config.save_every == 0 or untimed) and rested
        if run.rank == 0 and (is_last or out_of_time or is_due):
            save_began = time.monotonic()
            save(run)
            last_save = time.monotonic()
            longest_save = max(longest_save, last_save - save_began)

        # say so
        left = sum(usual) / len(usual) * (config.epochs - epoch)
        if run.rank == 0:
            log.say(log.line(row, left, run.unused))
        if out_of_time and not is_last:
            if run.rank == 0:
                log.say(f"out of time: {checkpoint.saved_in(config.out)}")
                log.say(f"continue with: {log.command(argv, run.world)}")
            return
    if run.rank == 0:
        finish(run)


def finish(run: Run):
    """Evaluate the best checkpoint on the test set, once for a run and its --data-dir."""
    out, whole = run.config.out, snapshot(run)
    derive(run, whole)  # what a kill may have kept from being written
    best = checkpoint.best_of(whole)
    seen = evaluate.read_metrics(out)  # one made before the last epoch does not count
    data_dir = os.path.realpath(run.config.data_dir)
    seen_dir = os.path.realpath(seen.get("data_dir", data_dir))
    look = (seen.get("epoch"), seen.get("epochs_trained"), seen_dir)
    if look == (best["epoch"], run.config.epochs, data_dir):
        log.say(f"the run in {out}/ is complete, and so is its evaluation")
        return
    log.say(
        f"\nbest epoch {best['epoch']}, validation accuracy {best['accuracy']:.2%}; "
        f"now, once, the test set:"
    )
    device = str(run.device)
    evaluate.evaluate(best, out, device=device, dataset=run.dataset, history=run.history)
    example = log.quote(["python", log.program("evaluate.py"), out, "--images"])
    log.say(f"wrote metrics.json and pictures into {out}/; try {example} PICTURE")


# --- the program ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Train, as the command line says. Returns the exit code.

    0 when all is done or the time is up; 130, 143 and 129 after Ctrl-C, SIGTERM and SIGHUP.
    SystemExit, with one line on stderr, is 1 for a loss that diverged and 2 for errors that the
    user can fix.
    """
    began = time.monotonic()
    world = int(os.environ.get("WORLD_SIZE") or 1)
    rank = int(os.environ.get("RANK") or 0) if world > 1 else 0
    out, lock_file, parser = TrainConfig.out, None, recipe.make_parser()

    def ignore_signals():
        """From here on none may cut off the last lines."""
        for number in old_handlers:
            signal.signal(number, signal.SIG_IGN)

    def on_disk() -> str:
        ignore_signals()
        return checkpoint.saved_in(out)

    def going_on() -> str:
        return f"{on_disk()}; continue with: {log.command(argv, world)}"

    def fail(code: int, text: object, alone: bool = False):
        """alone: it may have happened to this process only."""
        who = f"rank {rank}: " if alone and world > 1 else ""
        line = f"error: {who}{log.one_line(text)}\n"
        parser.exit(code, line if alone or rank == 0 else None)

    old_handlers = log.listen_to_signals()
    try:
        preset, flags = recipe.parse(argv, parser)
        out = flags.get("out", out)
        try:
            run = prepare(preset, flags, rank, world)
            if rank == 0:
                lock_file = checkpoint.lock(out)
                # another run may have come and gone while the data were read
                last = checkpoint.check_out(out, resume=run.epoch > 0)
                if last and last["epoch"] != run.epoch:
                    raise ValueError(f"another run has gone on in {out} meanwhile: try again")
        except BrokenPipeError:  # as in `| head`: see log.run_program
            raise
        except (ValueError, OSError) as error:
            if rank > 0:  # rank 0 may say the same, and torchrun then ends this process
                time.sleep(machine.GRACE)
            fail(2, error, alone=rank > 0)
        train(run, began, argv)
        if world > 1:
            try:
                dist.barrier()  # rank 0 may still be evaluating
                dist.destroy_process_group()
            except RuntimeError:  # the other process left first; all is written, nothing failed
                pass
        return 0
    except log.Stopped as stopped:
        ignore_signals()
        [number] = stopped.args
        if rank == 0:
            told = f"stopped by {signal.Signals(number).name}: {checkpoint.saved_in(out)}"
            log.say_at_last(f"{told}\ncontinue with: {log.command(argv, world)}")
        return 128 + number
    except Diverged as error:
        clip = [] if run.config.grad_clip else ["--grad-clip", "1"]
        is_float16 = run.state.scaler.is_enabled()  # in which the forward pass overflows as well
        rescue = ["--dtype", "float32"] if is_float16 else [*clip, "--lr", "LOWER"]
        command = log.command(argv, world, *rescue)
        fail(1, f"{error}. {' '.join(rescue)} may help. {on_disk()}; continue with: {command}")
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that is gone
        fail(2, f"{error}. {going_on()}", alone=True)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            error.add_note(going_on())  # below the traceback: the run is not lost
            raise
        hint = "a smaller --batch-size, --image-size or network (in a new --out) needs less"
        fail(2, f"out of memory: {hint}. {on_disk()}", alone=True)
    finally:
        if lock_file is not None:
            os.close(lock_file)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(log.run_program(main))
