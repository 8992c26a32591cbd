"""
The specification of checkpoint.py: what reaches the disk is whole, what is read is checked, and no
run is written over.

Failures are real ones where that can be done: the kernel's own full disk, signals that arrive while
a file is written, folders of another user.
"""

import builtins
import contextlib
import errno
import fcntl
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import checkpoint
import train
from checkpoint import best_of, build_model, check_out, load_checkpoint, save_checkpoint, saved_in
from testing import DATASET, FSYNC, Kill, Payload, difference, flat, refusal, run, small_batch, tree
from vit import ViTConfig

pytestmark = pytest.mark.usefixtures("tiny", "here")


def read(path):
    return flat(torch.load(path, weights_only=True))


# ---- Writing ----


@pytest.mark.parametrize("owner, stage", [(builtins, "open"), (os, "fsync"), (os, "replace")])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), Kill()])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    owner, stage, failure, old, monkeypatch
):
    """Whatever fails, and whenever; also a signal, which is no Exception."""

    def fail(*_):
        raise failure

    if old:
        Path("a.pt").write_bytes(old)
    before = tree()
    with monkeypatch.context() as patch:
        patch.setattr(owner, stage, fail)
        with pytest.raises(type(failure)):
            checkpoint.write_atomically("a.pt", b"new")
    assert tree() == before
    checkpoint.write_atomically("a.pt", b"new")
    assert tree() == {"a.pt": b"new"}


@pytest.mark.parametrize("times", [1, 3, 4])
def test_a_file_that_another_program_has_open_is_replaced_as_soon_as_it_is_closed(
    times, monkeypatch
):
    """On Windows a virus scanner may have it open, and a save must not end a run for that. After
    two seconds it is an error like any other."""
    Path("a.pt").write_bytes(b"old")
    refusals, waited, real = [PermissionError(errno.EACCES, "in use")] * times, [], os.replace

    def busy(*paths):
        if refusals:
            raise refusals.pop()
        real(*paths)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(checkpoint.time, "sleep", waited.append)
    if times < 4:
        checkpoint.write_atomically("a.pt", b"new")
    else:
        with pytest.raises(PermissionError, match="in use"):
            checkpoint.write_atomically("a.pt", b"new")
    assert tree() == {"a.pt": b"new" if times < 4 else b"old"}
    assert len(waited) == min(times, 3) and sum(waited) <= 2
    assert times < 3 or sum(waited) > 1.5


def test_a_write_that_is_stopped_when_all_is_done_has_been_done(monkeypatch):
    """A signal may come between the last two lines."""

    def replace(*args, real=os.replace):
        real(*args)
        raise Kill

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Kill):
        checkpoint.write_atomically("a.pt", b"new")
    assert tree() == {"a.pt": b"new"}


def test_a_file_is_whole_on_the_disk_before_it_takes_the_place_of_the_old_one(monkeypatch):
    """Else a power cut could leave an empty one. Both lie in one folder, so that replacing is one
    step."""
    on_disk, real = [], {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(fd):
        real["fsync"](fd)
        inode = os.fstat(fd).st_ino
        [file] = [path for path in Path("d").iterdir() if path.stat().st_ino == inode]
        on_disk.append((inode, file.read_bytes()))

    def replace(source, target):
        assert on_disk == [(os.stat(source).st_ino, b"text")]
        assert os.path.dirname(source) == os.path.dirname(target) == "d"
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    os.makedirs("d")
    checkpoint.write_atomically("d/a", b"text")
    assert tree() == {"d": None, "d/a": b"text"}


def test_what_a_killed_write_has_left_is_no_obstacle():
    Path("a.pt.tmp").write_bytes(b"half of something longer")
    checkpoint.write_atomically("a.pt", b"whole")
    assert tree() == {"a.pt": b"whole"}


def test_a_checkpoint_is_read_as_it_was_written():
    """Tensors to the bit, numbers, text, None: plain data, which weights_only=True accepts."""
    whole = {"model": {"w": torch.randn(5, 7)}, "epoch": 3, "lr": 1e-3, "best": None, "n": ["a"]}
    save_checkpoint(whole, "a.pt")
    assert difference(flat(whole), read("a.pt")) is None
    with pytest.raises((AttributeError, pickle.PicklingError)):  # which of them: Python's version
        save_checkpoint({"x": lambda: 0}, "a.pt")
    assert difference(flat(whole), read("a.pt")) is None and len(tree()) == 1


def save_under_signals(number, tensors):
    """Save (tensors of 2 MB each) until so many signals came during a save."""
    os.fsync = FSYNC

    class Stopped(BaseException): ...

    def stop(*_):
        raise Stopped

    def whole(epoch):
        return {"epoch": epoch, **{str(i): torch.full((1 << 18,), epoch) for i in range(tensors)}}

    signal.signal(signal.SIGALRM, stop)
    stopped, seconds = 0, 9.0
    for epoch in range(1, 20 * number):
        old, new, began = whole(-epoch), whole(epoch), time.perf_counter()
        save_checkpoint(old, "a.pt")
        seconds = min(seconds, time.perf_counter() - began)
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds * (stopped + 1) / (number + 1))
            save_checkpoint(new, "a.pt")
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Stopped:
            stopped += 1
        found = torch.load("a.pt", weights_only=True)
        assert found["epoch"] in (-epoch, epoch), found["epoch"]
        assert all((x == found["epoch"]).all() for x in found.values() if torch.is_tensor(x))
        assert os.listdir() == ["a.pt"]
        if stopped == number:
            break
    assert stopped == number


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("number, tensors", [(5, 4), pytest.param(60, 32, marks=pytest.mark.slow)])
def test_a_signal_during_a_save_stops_it_and_loses_nothing(number, tensors):
    """Signals spread over the time a save takes, whose handler raises, as train.py's does. The
    exception comes out as it went in, the process lives, and the file is the old or the new one.

    (Writing from within torch.save, 46 of 60 ended in a RuntimeError or an abort.)"""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=save_under_signals, args=(number, tensors))
    process.start()
    process.join()
    assert process.exitcode == 0


@contextlib.contextmanager
def largest_file(size):
    """The system refuses to write beyond this size, in the middle of a file, as `ulimit -f` has it;
    also to C++."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_for_which_there_is_no_room_says_so_and_leaves_the_old_file():
    """The system's own error, and not one of torch.save that buries it."""
    save_checkpoint({"x": torch.zeros(9)}, "a.pt")
    before = tree()
    with largest_file(100_000), pytest.raises(OSError, match="File too large"):
        save_checkpoint({"x": torch.zeros(100_000)}, "a.pt")
    assert tree() == before
    save_checkpoint({"x": torch.zeros(100_000)}, "a.pt")
    assert len(read("a.pt")["/x"]) == 100_000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full, always full")
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.csv"])
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_there_was(name, capsys):
    """Each of the files in turn is written to a device that is full. Exit code 2, the reason, what
    is on the disk, and the command that continues; it does, once there is space."""
    assert run("--max-minutes", 1e-9, "--epochs", 4) == 0
    before = tree()
    os.symlink("/dev/full", f"out/{name}.tmp")
    capsys.readouterr()
    assert run("--resume", "--epochs", 4) == 2
    [line] = capsys.readouterr().err.splitlines()
    epoch = 1 if name == "last.pt" else 2
    assert "No space left on device" in line and f"out/last.pt holds epoch {epoch} of 4" in line
    assert "continue with: python " in line and line.endswith(" --resume")
    assert tree().keys() == before.keys() and tree()[f"out/{name}"] == before[f"out/{name}"]
    assert run("--resume", "--epochs", 4) == 0


# ---- What is in a checkpoint ----


def test_best_holds_the_best_weights_and_what_it_takes_to_use_them(plain):
    """It is derived from last.pt: the same facts, and nothing of the state of training."""
    last, best = (torch.load(plain / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert difference(flat(best), flat(best_of(last))) is None
    assert (best["epoch"], best["accuracy"]) == (last["best"]["epoch"], last["best"]["accuracy"])
    assert difference(flat(best["model"]), flat(last["best"]["model"])) is None
    for name in ("format", "train", "vit", "classes", "mean", "std", "fingerprint", "versions"):
        assert best[name] == last[name]
    assert not {"optimizer", "scheduler", "scaler", "ema", "history", "best"} & set(best)
    assert (
        "/best" not in flat(last) and load_checkpoint(plain / "best.pt")["epoch"] == best["epoch"]
    )


def test_a_checkpoint_rebuilds_the_model_without_any_flags(monkeypatch):
    """The same logits, to the bit, for whatever is not the default; ready to predict."""
    flags = "--pool mean --mlp-ratio 3 --heads 4 --relative-position-bias --dropout 0.2"
    trained, real = [], train.finish
    monkeypatch.setattr(train, "finish", lambda run: (trained.append(run.state.model), real(run)))
    assert run(*flags.split()) == 0
    last = load_checkpoint("out/last.pt")
    config = ViTConfig(8, 4, 3, 3, 8, 1, 4, 3.0, 0.2, pool="mean", relative_position_bias=True)
    model = build_model(last)
    assert model.config == config and not model.training
    assert (last["classes"], last["mean"], last["std"]) == (
        DATASET.classes,
        DATASET.mean,
        DATASET.std,
    )
    assert difference(flat(dict(model.state_dict())), flat(dict(trained[0].state_dict()))) is None
    images = small_batch(0)[0].float()
    assert torch.equal(model(images), trained[0].eval()(images))


def test_the_rebuilt_model_has_the_average_where_the_run_keeps_one():
    """Of last.pt the weights one predicts with; best.pt has only those."""
    assert run("--ema-decay", 0.9) == 0
    last, best = load_checkpoint("out/last.pt"), load_checkpoint("out/best.pt")
    for found, expected in ((last, last["ema"]), (best, last["best"]["model"])):
        assert difference(flat(dict(build_model(found).state_dict())), flat(dict(expected))) is None
    assert difference(flat(dict(last["ema"])), flat(dict(last["model"])))


# ---- Reading ----


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


def png(path):
    Image.new("RGB", (8, 8)).save(path, "PNG")


def another_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


def saved(thing):
    return lambda path: torch.save(thing, path)


def edited(change):
    def edit(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return edit


DAMAGE = {  # what is done to a good checkpoint, given its path, and what is said of it
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "half": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "damaged",
    ),
    "without its last byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "a flipped bit": (flip_a_bit, "wrong checksum"),
    "text": (
        lambda path: path.write_text("epoch 3 was a good one\n"),
        "damaged or not a checkpoint",
    ),
    "html": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "not a checkpoint"),
    "a picture": (png, "not a checkpoint"),
    "another zip": (another_zip, "not a checkpoint"),
    "a pickle": (
        lambda path: path.write_bytes(pickle.dumps(Payload("hacked"))),
        "not a checkpoint",
    ),
    "malicious": (saved({"format": checkpoint.FORMAT, "x": Payload("hacked")}), "not a checkpoint"),
    "foreign": (saved({"state_dict": {}}), "not a checkpoint of train.py"),
    "a list": (saved([1, 2]), "not a checkpoint of train.py"),
    "a tensor as its format": (saved({"format": torch.ones(99)}), "not a checkpoint of train.py"),
    "the old format": (
        edited(lambda c: c.update(format="vit-cifar10 checkpoint 2")),
        "another version",
    ),
    "another network": (edited(lambda c: c["vit"].update(dim=16)), "(size mismatch for "),
    "an impossible network": (edited(lambda c: c["vit"].update(dim=7)), "(dim 7 is not divisible"),
    "an unknown network": (edited(lambda c: c["vit"].update(registers=4)), "'registers'"),
    "no model": (edited(lambda c: c.pop("model")), "whole model, as this vit.py builds it"),
    "a weight missing": (edited(lambda c: c["model"].pop("head.bias")), "Missing key(s) in state_"),
    "another block": (
        edited(lambda c: c["model"].update({f"blocks.9.{'x' * i}": None for i in range(99)})),
        "Unexpected key(s) in state_",
    ),
    "no classes": (edited(lambda c: c.pop("classes")), "(classes)"),
    "no fingerprint, no epoch": (
        edited(lambda c: (c.pop("epoch"), c.pop("fingerprint"))),
        "(fingerprint, epoch)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_named_as_such(damage, plain, here):
    """One line with the path; the file stays as it is; no code in it runs."""
    os.makedirs("out")
    path = here / "out" / "last.pt"
    shutil.copy(plain / "last.pt", path)
    spoil, said = DAMAGE[damage]
    spoil(path)
    before = tree()
    text = refusal(load_checkpoint, "out/last.pt")
    assert "out/last.pt" in text and said in text and len(text) < 250
    assert "weights_only" not in text  # torch's own message advises to switch the protection off
    assert tree() == before and not Path("hacked").exists()


def test_a_checkpoint_of_another_version_says_which_was_expected_and_which_was_found():
    torch.save({"format": "vit-cifar10 checkpoint 2", "model": {}}, "a.pt")
    text = refusal(load_checkpoint, "a.pt")
    assert "expected 'vit-cifar10 checkpoint 3', found 'vit-cifar10 checkpoint 2'" in text


def test_a_checkpoint_that_is_not_there_is_named():
    """A folder of that name is no checkpoint either."""
    os.makedirs("out")
    for path in ("none.pt", "out"):
        with pytest.raises(FileNotFoundError, match=f"^no checkpoint at {path}$"):
            load_checkpoint(path)


def test_tensors_are_read_onto_the_cpu(plain, monkeypatch):
    """Wherever they were: a checkpoint of a GPU can be read without one."""
    seen, real = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: seen.append(k["map_location"]) or real(*a, **k)
    )
    load_checkpoint(plain / "last.pt")
    assert torch.device(seen[0]) == torch.device("cpu")


def test_the_payload_of_these_tests_would_have_worked():
    """Else the absence of its trace would prove nothing."""
    pickle.loads(pickle.dumps(Payload("hacked")))
    assert Path("hacked").exists()


def test_a_flipped_bit_passes_torch_load(plain, here):
    """pytorch/pytorch#126952: this is why every byte is checked against its CRC."""
    shutil.copy(plain / "last.pt", "last.pt")
    flip_a_bit(here / "last.pt")
    assert difference(read("last.pt"), read(plain / "last.pt"))


# ---- What lies in a folder ----


@contextlib.contextmanager
def as_nobody():
    """Within, this process may do what anyone may; root could read and write everything."""
    ids = os.getresuid()
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(*ids)


@pytest.fixture
def public():
    """A folder that anyone may enter; those of pytest are their owner's alone."""
    if not hasattr(os, "setresuid"):
        pytest.skip("users cannot be changed here")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(plain, public):
    shutil.copy(plain / "last.pt", public)
    os.chmod(public / "last.pt", 0o000)
    with as_nobody():
        text = refusal(load_checkpoint, str(public / "last.pt"))
    assert text == f"cannot read {public}/last.pt: Permission denied"


def test_a_disk_that_fails_is_not_called_a_damaged_file(plain, monkeypatch):
    """It may be back in a minute, and a damaged file would be deleted."""
    away = OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    monkeypatch.setattr(zipfile.ZipFile, "testzip", mock.Mock(side_effect=away))
    text = refusal(load_checkpoint, str(plain / "last.pt"))
    assert text == f"cannot read {plain}/last.pt: Transport endpoint is not connected"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried")])
@pytest.mark.parametrize("owner, name", [(torch, "load"), (checkpoint, "build_model")])
def test_a_checkpoint_that_the_memory_does_not_hold_is_not_called_damaged(
    error, owner, name, plain, monkeypatch
):
    monkeypatch.setattr(owner, name, mock.Mock(side_effect=error))
    text = refusal(load_checkpoint, str(plain / "last.pt"))
    assert text == f"cannot read {plain}/last.pt: out of memory"


def test_an_output_folder_without_a_name_is_refused():
    """As --out=$FOLDER is, where that is not set."""
    assert refusal(check_out, "", False) == "the output folder has no name"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_without_a_run_is_a_fresh_start(resume):
    """So one command both starts and continues. Looking makes no folder."""
    os.makedirs("out")
    Path("out/notes.txt").write_text("mine")
    before = tree()
    for out in ("out", "new", "new/below/it", os.path.abspath("new")):
        assert check_out(out, resume) is None
    assert tree() == before


@pytest.mark.parametrize(
    "left",
    [["last.pt"], ["best.pt"], ["metrics.json"], ["log.csv"], ["last.pt", "best.pt", "log.csv"]],
)
def test_an_existing_run_is_never_overwritten_unasked(left, plain):
    """A second start into the same folder names the two ways on.

    (A metrics.json that is left over would pass for the new run's look at the test set.)
    """
    os.makedirs("my out")
    for name in left:
        shutil.copy(plain / name, "my out")
    before = tree()
    text = refusal(check_out, "my out", False)
    assert text.startswith("my out already holds a run") and "--resume" in text and "--out" in text
    assert tree() == before


@pytest.mark.parametrize("left", [["best.pt"], ["metrics.json"], ["log.csv", "best.pt"]])
def test_what_is_left_of_a_run_without_its_last_is_neither_resumed_nor_overwritten(left, plain):
    """No kill leaves this: last.pt is written first, and was lost."""
    os.makedirs("out")
    for name in left:
        shutil.copy(plain / name, "out")
    before = tree()
    text = refusal(check_out, "out", True)
    assert "no last.pt to resume from: choose another --out" in text
    assert any(f"out holds {name} but" in text for name in left) and tree() == before


def test_resume_gets_the_whole_of_last(plain):
    found = check_out(str(plain), True)
    assert difference(flat(found), read(plain / "last.pt")) is None


def test_best_is_no_substitute_for_last(plain):
    """A best.pt renamed to last.pt holds no optimizer: one line, not a KeyError."""
    os.makedirs("out")
    shutil.copy(plain / "best.pt", "out/last.pt")
    assert "out/last.pt is a best.pt" in refusal(check_out, "out", True)


def test_a_damaged_last_is_not_taken_for_an_empty_folder():
    os.makedirs("out")
    Path("out/last.pt").write_bytes(b"")
    assert "out/last.pt is damaged" in refusal(check_out, "out", True)
    assert "already holds a run" in refusal(check_out, "out", False)


@pytest.mark.parametrize("out", ["file", "file/below/it", "nowhere", "nowhere/below"])
def test_a_file_in_the_way_of_the_output_folder_is_refused(out):
    """Before the first epoch and not after it, when it is lost. A link to nothing is no folder."""
    Path("file").write_text("mine")
    os.chmod("file", 0o777)
    os.symlink("gone", "nowhere")
    text = refusal(check_out, out, False)
    assert text.startswith(f"cannot write to the output folder {out}: ")
    assert f"{Path(out).parts[0]} is not a folder that can be written to (" in text


@pytest.mark.parametrize("mode", [0o555, 0o666])
@pytest.mark.parametrize("out", ["out", "out/new", "out/new/below"])
def test_a_folder_that_may_not_be_written_to_is_refused_at_once(out, mode, public):
    """Neither may it be one that may be written to and not entered."""
    (public / "out").mkdir()
    os.chmod(public / "out", mode)
    with as_nobody():
        text = refusal(check_out, str(public / out), False)
    assert f"cannot write to the output folder {public}/{out}: {public}/out is not" in text
    os.chmod(public / "out", 0o777)
    with as_nobody():
        assert check_out(str(public / out), False) is None


def test_a_folder_that_can_be_written_to_is_no_matter_of_what_the_system_says(monkeypatch):
    """Some network drives answer no for everybody, and let all write."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert check_out("out", False) is None and not tree()


def test_what_is_saved_is_read_from_the_disk(plain):
    """Whatever the process believes: nothing, something, something that cannot be read."""
    assert saved_in("out") == "no epoch is saved in out"
    shutil.copytree(plain, "out")
    edited(lambda content: content.update(epoch=1))(Path("out/last.pt"))
    assert saved_in("out") == "out/last.pt holds epoch 1 of 2"
    Path("out/last.pt").write_bytes(b"half")
    text = "out/last.pt is damaged or not a checkpoint of train.py (BadZipFile)"
    assert saved_in("out") == f"what was saved cannot be read now ({text})"


def test_a_disk_that_is_away_is_not_an_empty_one(plain, monkeypatch):
    """As Google Drive in a notebook, for some seconds: what was saved is not lost."""
    shutil.copytree(plain, "out")
    away = OSError(errno.ENOTCONN, "Transport endpoint is not connected", "out/last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", mock.Mock(side_effect=away))
        assert saved_in("out") == f"what was saved cannot be read now ({away})"
    assert saved_in("out") == "out/last.pt holds epoch 2 of 2"


def test_a_folder_is_locked_until_its_run_ends():
    """Against others, in this process or in another, that ask for it. By a file that is open for
    writing, as only of such a lock NFS tells other machines."""
    os.mkdir("out")
    file = checkpoint.lock("out")
    assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    with pytest.raises(ValueError, match="^another run is writing to out: choose another --out$"):
        checkpoint.lock("out")
    os.close(file)
    again = checkpoint.lock("out")
    assert again is not None and os.listdir("out") == [".lock"]
    os.close(again)


def test_a_folder_of_two_users_is_locked_for_both(monkeypatch):
    """The second may not write to the first one's file."""
    os.mkdir("out")
    mask = os.umask(0o022)
    file, real = checkpoint.lock("out"), os.open
    os.umask(mask)
    assert os.stat("out/.lock").st_mode & 0o044 == 0o044  # but may read it

    def refuse(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match="another run"):
        checkpoint.lock("out")
    os.close(file)


def test_where_there_are_no_locks_a_run_goes_on_without(monkeypatch):
    """On some network drives, and on Windows."""
    os.mkdir("out")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    os.close(checkpoint.lock("out"))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert checkpoint.lock("out") is None


def test_where_no_lock_file_can_be_opened_a_run_goes_on_without(monkeypatch):
    os.mkdir("out")
    refuse = mock.Mock(side_effect=OSError(errno.EOPNOTSUPP, "Operation not supported"))
    monkeypatch.setattr(os, "open", refuse)
    assert checkpoint.lock("out") is None
