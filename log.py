"""
What a program says and how it ends: the same numbers as columns on the screen and in log.csv, the
command that continues a run, signals and exit codes.

    model     the network, in numbers
    data      how many images of what
    ...
    epoch       lr train loss ...      one line an epoch, within 100 characters
"""

import contextlib
import csv
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

from tqdm import tqdm

from checkpoint import write_atomically

COLUMNS = (  # of log.csv: name, title on the screen (none: not shown), width, format
    ("epoch", "epoch", 5, "d"),
    ("lr", "lr", 8, ".1e"),
    ("train_loss", "train loss", 10, ".4f"),
    ("val_loss", "val loss", 8, ".4f"),
    ("val_accuracy", "val acc", 7, ".2%"),
    ("ema_accuracy", "ema acc", 7, ".2%"),
    ("train_accuracy", "train acc", 9, ".2%"),
    ("grad_norm", "|grad|", 6, ".2f"),
    ("skipped_steps", "skipped", 7, "d"),
    ("images_per_second", "img/s", 7, ",.0f"),
    ("mfu", "MFU", 5, ".1%"),
    ("seconds", "", 0, ""),
)
NAMES = tuple(name for name, *_ in COLUMNS)


def hms(seconds: float) -> str:
    """A duration as a clock shows it: 12:34, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def shown(unused: tuple) -> list[tuple]:
    return [column for column in COLUMNS if column[1] and column[0] not in unused]


def header(unused: tuple) -> str:
    """The titles of the columns, without the names in `unused`."""
    return " ".join([*(f"{title:>{width}}" for _, title, width, _ in shown(unused)), "    left"])


def line(row: dict, left: float, unused: tuple) -> str:
    """One epoch, in the columns of header(unused); left: seconds to go."""
    cells = [
        f"{'' if row[name] is None else format(row[name], form):>{width}}"
        for name, _, width, form in shown(unused)
    ]
    return " ".join([*cells, f"{hms(left):>8}"])


def write_log(path: str, history: list[dict]):
    """log.csv, whole each time: a kill leaves no torn row, and a resumed run no double one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, text.getvalue().encode())


def read_log(path: str) -> list[dict]:
    """The rows of log.csv, as dictionaries of floats; an empty cell is None.

    A spreadsheet may have saved it, with a byte-order mark. ValueError if it is not such a table.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        history = [
            {key: None if row[key] == "" else float(row[key]) for key in NAMES} for row in rows
        ]
        if any(None in row or row["epoch"] == "" for row in rows):  # None: a cell more than names
            raise ValueError
        return history
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path} is not a log of train.py any more") from None


def describe_model(config) -> str:
    """The network of a ViTConfig, in one line: it can be said before the data are loaded."""
    size, token = config.image_size, " + class token" if config.pool == "cls" else ""
    return (
        f"model    {size}x{size} pixels, patch {config.patch_size}: {config.num_patches} patches"
        f"{token} | dim {config.dim}, depth {config.depth}, heads {config.heads}"
    )


def describe_run(run, steps: int) -> str:
    """A train.Run before its first epoch, in lines of at most 100 characters."""
    config, dataset, facts = run.config, run.dataset, run.versions
    parameters = sum(p.numel() for p in run.state.model.parameters())
    bias = ", relative position bias" if run.vit_config.relative_position_bias else ""
    compiled = ", compiled" if run.state.compiled else ""
    dtype = str(run.state.dtype).removeprefix("torch.")
    if config.dtype not in ("auto", dtype):
        dtype += f" in place of {config.dtype}"
    lines = (
        f"         {parameters:,} parameters{bias} | "
        f"{run.vit_config.flops_per_image / 1e6:,.1f} MFLOP an image forward",
        f"data     {config.dataset}: {len(run.train_set[0]):,} training, {len(run.val_set[0]):,} "
        f"validation, {len(dataset.test_images):,} test images, {len(dataset.classes)} classes",
        f"recipe   {config.epochs} epochs, {steps:,} steps of {config.batch_size} images | "
        f"seed {config.seed}",
        f"         {config.optimizer}, peak lr {config.lr:g}, weight decay {config.weight_decay:g}",
        f"machine  {run.world} x {facts['device']}, {dtype}{compiled}",
        f"         torch {facts['torch']}, commit {facts['commit']}",
        f"         large matrix products do {run.peak / 1e12:.2f} TFLOP/s: the 100 % of MFU",
    )
    return "\n".join(lines)


def describe_start(run, loss: float | None) -> str:
    """Where a train.Run begins; loss: its validation loss before the first step, of a fresh one."""
    if run.epoch:
        best = f", best so far {run.best['accuracy']:.2%}" if run.best else ""
        return f"resumed  after epoch {run.epoch} of {run.config.epochs}{best}"
    K = len(run.dataset.classes)
    return (
        f"start    loss {loss:.4f} before training; guessing among {K} classes costs "
        f"ln({K}) = {math.log(K):.4f}"
    )


def program(name: str) -> str:
    """One of these files, as it can be called from where the user stands."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    try:
        return min(path, os.path.relpath(path), key=len)
    except (OSError, ValueError):  # that folder has been removed; on Windows, on another drive
        return path


def command(argv: list[str] | None, world: int, *more: str) -> str:
    """The command that continues a run, quoted for a shell."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    here = os.environ.get("LOCAL_WORLD_SIZE", world)  # of the processes those on this machine
    launcher = ["python"] if world == 1 else ["torchrun", f"--nproc_per_node={here}"]
    return quote([*launcher, program("train.py"), *words, "--resume", *more])


def quote(words: list[str]) -> str:
    """One line that a shell, or the command prompt of Windows, takes apart into these words."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def one_line(error: object) -> str:
    """A message of several lines as one; spaces in a path stay as they are."""
    return " ".join(map(str.strip, str(error).splitlines()))


def silence(stream):
    """Send whatever is still written to this stream to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str):
    """Print a line at once, or not at all where the terminal is gone: the same is in log.csv."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as in `| head`: nobody wants more
        raise
    except OSError:  # or its disk is full
        silence(sys.stdout)


def say_at_last(text: str):
    """Print lines that must be seen, on stderr where nobody reads stdout any more.

    As in `| tee log.txt`, which Ctrl-C ends, too.
    """
    try:
        say(text)
    except BrokenPipeError:
        silence(sys.stdout)
        print(text, file=sys.stderr, flush=True)


# Windows has no SIGHUP
SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class Stopped(BaseException):
    """Ctrl-C, SIGTERM, or the SIGHUP of a terminal that closes.

    A BaseException, so that no `except Exception` on the way swallows it.
    """


def listen_to_signals() -> dict:
    """Let these signals raise Stopped. Returns the handlers there were, {} outside the main thread.

    One that is ignored stays so: a shell's script starts `train.py &` with SIGINT ignored. A second
    signal within a second is the same request (torchrun sends both); a later one counts, for the
    first may have been swallowed, as in a __del__.
    """
    heard = -math.inf

    def stop(signum, frame):
        nonlocal heard
        if time.monotonic() - heard > 1:
            heard = time.monotonic()
            raise Stopped(signum)

    if threading.current_thread() is not threading.main_thread():
        return {}  # Python allows handlers in the main thread only
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, stop) for number in heeded}


def run_program(main) -> int:
    """Run main() as a program: a name that the terminal cannot print, a reader that goes away or an
    interrupt causes no traceback. Returns the exit code."""
    # None when closed, as by `>&-`; a notebook has streams of its own
    streams = [s for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    # tqdm's thread would wait at the end, forever before 4.68.1, for a lock that a signal leaves
    # taken in the middle of a write, as to a terminal that has stalled (tqdm/tqdm#1751).
    tqdm.monitor_interval = 0
    # `!python` in a notebook inherits its MPLBACKEND, of a package that may not be installed here
    os.environ["MPLBACKEND"] = "agg"
    try:
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        for stream in streams:
            try:
                stream.flush()
            except BrokenPipeError:
                raise
            except OSError as error:  # the disk of `> file` is full; Python would try again
                silence(stream)
                if not code:
                    code = 2
                    with contextlib.suppress(OSError):  # it may be full below stderr, too
                        print(f"error: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `| head`; Python would try again to write at its end
        for stream in streams:
            silence(stream)
        return 141
