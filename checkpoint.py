"""
Checkpoints: what they hold, how they reach the disk whole, and how they are read.

    last.pt    the whole truth of a run, as of the end of an epoch: the state of training, both
               configs, the history, and the best weights so far
    best.pt    derived from it: the best weights, with what it takes to use them

Plain data only, so reading one never runs code that hides in a file.
"""

import io
import os
import time
import zipfile

import torch

from machine import is_out_of_memory
from vit import VisionTransformer, ViTConfig

FORMAT = "vit-cifar10 checkpoint 3"  # the first thing in a checkpoint; another number, another form
# What it takes to use a model: which network, trained how, on what, by which program.
FACTS = ("format", "train", "vit", "classes", "mean", "std", "fingerprint", "versions")


def write_atomically(path: str, content: bytes):
    """path holds the old file or the whole new one, whatever happens.

    Written beside the target, flushed to the disk, then moved into place. A kill, a signal or an
    OSError leaves the old file as it was.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def replace(temporary: str, path: str):
    """os.replace(), tried for two seconds: on Windows it fails while another program, often a virus
    scanner, has the old file open."""
    for pause in (0.1, 0.4, 1.5):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(pause)
    os.replace(temporary, path)


def save_checkpoint(checkpoint: dict, path: str):
    """Write plain data, as torch.save packs it.

    Packed in memory first: torch.save calls a file's write() from C++, where a signal or a full
    disk would end in an error that hides the reason, or abort the process.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def best_of(checkpoint: dict) -> dict:
    """best.pt: from a last.pt that holds best weights."""
    best = checkpoint["best"]
    facts = {name: checkpoint[name] for name in FACTS}
    return {**facts, "epoch": best["epoch"], "accuracy": best["accuracy"], "model": best["model"]}


def load_checkpoint(path: str) -> dict:
    """Read last.pt or best.pt, with every tensor on the CPU.

    FileNotFoundError, or ValueError for a file that is damaged (every stored byte is checked
    against its CRC, which torch.load does not do), foreign, or of another version, or too large for
    the memory.
    """
    if not os.path.isfile(path):
        last = os.path.join(os.path.dirname(path), "last.pt")  # of a run without a validation yet
        hint = f"; there is {last}" if os.path.exists(last) else ""
        raise FileNotFoundError(f"no checkpoint at {path}{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:  # not of the file: of its disk, or of who may read it
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # zipfile and torch.load raise half a dozen types for broken files
        if is_out_of_memory(error):
            raise ValueError(f"cannot read {path}: out of memory") from None
        raise ValueError(
            f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})"
        ) from None
    if damaged:
        raise ValueError(f"{path} is damaged: wrong checksum in {damaged}")
    written = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if written != FORMAT:
        known = isinstance(written, str) and written.startswith("vit-cifar10 checkpoint ")
        what = "of another version of this program" if known else "not a checkpoint of train.py"
        raise ValueError(f"{path} is {what}: expected {FORMAT!r}, found {written!r:.60}")
    try:
        build_model(checkpoint)
        missing = [name for name in (*FACTS, "epoch") if name not in checkpoint]
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ValueError(f"cannot read {path}: out of memory") from None
        text = " ".join(str(error).split())  # of load_state_dict, pages of names
        missing = [text.removeprefix("Error(s) in loading state_dict for VisionTransformer: ")]
    if missing:
        raise ValueError(
            f"{path} does not hold a whole model, as this vit.py builds it, and its data "
            f"({', '.join(missing):.100})"
        )
    return checkpoint


def build_model(checkpoint: dict) -> VisionTransformer:
    """The trained model in eval mode: with the averaged weights (EMA) where the run keeps them."""
    model = VisionTransformer(ViTConfig(**checkpoint["vit"]))
    model.load_state_dict(checkpoint.get("ema") or checkpoint["model"])
    return model.eval()


def check_out(out: str, resume: bool) -> dict | None:
    """The checkpoint to resume from, or None for a fresh start.

    ValueError where a run would be lost or could not be kept.
    """
    if not out:  # as --out=$FOLDER is, where that is not set
        raise ValueError("the output folder has no name")
    parent = os.path.abspath(out)
    while not os.path.lexists(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    # os.access() would ask and not try, and is told wrongly by some network drives; on Windows
    # tempfile would try for ever (python/cpython#66305).
    trial = os.path.join(parent, f".trial-{os.getpid()}-{time.time_ns()}")
    try:
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL))
        os.remove(trial)
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {out}: "
            f"{parent} is not a folder that can be written to ({error.strerror})"
        ) from None
    names = ("last.pt", "best.pt", "metrics.json", "log.csv")
    found = [name for name in names if os.path.exists(os.path.join(out, name))]
    if found and not resume:
        raise ValueError(
            f"{out} already holds a run: continue it with --resume, or choose another --out"
        )
    if "last.pt" in found:
        checkpoint = load_checkpoint(os.path.join(out, "last.pt"))
        if "optimizer" not in checkpoint:
            raise ValueError(f"{out}/last.pt is a best.pt, which holds no run to resume")
        return checkpoint
    if found:
        raise ValueError(
            f"{out} holds {found[0]} but no last.pt to resume from: choose another --out"
        )
    return None


def lock(out: str) -> int | None:
    """Take an advisory lock on the folder's .lock. Returns a file descriptor, to close at the end.

    The system closes it, too, when the process dies. Where there are no such locks (Windows, some
    network drives) nothing is locked, and it may be None. ValueError where another process has it.
    """
    path = os.path.join(out, ".lock")
    try:
        import fcntl

        try:  # open for writing: NFS tells other machines of no other locks
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's
            file = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"another run is writing to {out}: choose another --out") from None
    except OSError:
        pass
    return file


def saved_in(out: str) -> str:
    """What is on the disk, read from the disk (which may be away, as Google Drive at times is)."""
    path = os.path.join(out, "last.pt")
    try:
        os.stat(path)
        last = load_checkpoint(path)
    except FileNotFoundError:
        return f"no epoch is saved in {out}"
    except (ValueError, OSError) as error:
        return f"what was saved cannot be read now ({error})"
    return f"{path} holds epoch {last['epoch']} of {last['train']['epochs']}"
