"""
The specification of log.py: the same numbers on a screen of 100 columns and in log.csv, the command
that continues a run, and how a program behaves that is stopped or whose screen goes away.
"""

import contextlib
import csv
import inspect
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import log
from recipe import TrainConfig
from testing import HERE, tree
from vit import ViTConfig

pytestmark = pytest.mark.usefixtures("here")

NAMES = (
    *("epoch", "lr", "train_loss", "val_loss", "val_accuracy", "ema_accuracy", "train_accuracy"),
    *("grad_norm", "skipped_steps", "images_per_second", "mfu", "seconds"),
)
ROW = dict(zip(NAMES, (7, 1.5e-3, 1.5, 0.75, 0.875, 0.9, 0.95, 2.5, 3, 4_321.0, 0.25, 12.5)))


# ---- One line an epoch ----


@pytest.mark.parametrize(
    "seconds, clock",
    [
        *[(0, "0:00"), (9, "0:09"), (59.4, "0:59"), (59.6, "1:00"), (754, "12:34")],
        *[(3599.7, "1:00:00"), (3723, "1:02:03"), (36_000, "10:00:00"), (360_000, "100:00:00")],
    ],
)
def test_durations_are_shown_as_clocks_show_them(seconds, clock):
    assert log.hms(seconds) == clock


CELLS = {  # what stands above a column; the largest and the smallest number, and how it is shown
    "epoch": ("epoch", {300: "300", 1: "1"}),
    "lr": ("lr", {1e-3: "1.0e-03", 4e-9: "4.0e-09"}),
    "train_loss": ("train loss", {123.45678: "123.4568", 0.0: "0.0000"}),
    "val_loss": ("val loss", {123.45678: "123.4568", 0.0: "0.0000"}),
    "val_accuracy": ("val acc", {1.0: "100.00%", 0.0: "0.00%"}),
    "ema_accuracy": ("ema acc", {1.0: "100.00%", 0.0: "0.00%"}),
    "train_accuracy": ("train acc", {1.0: "100.00%", 0.0: "0.00%"}),
    "grad_norm": ("|grad|", {999.99: "999.99", 0.0: "0.00"}),
    "skipped_steps": ("skipped", {10_000: "10000", 0: "0"}),
    "images_per_second": ("img/s", {120_000.0: "120,000", 0.4: "0"}),
    "mfu": ("MFU", {0.995: "99.5%", 0.0: "0.0%"}),
}
OPTIONAL = ("ema_accuracy", "skipped_steps")  # where there is no average, no loss scale
UNUSED = [names for n in range(3) for names in itertools.combinations(OPTIONAL, n)]


@pytest.mark.parametrize("unused", UNUSED)
@pytest.mark.parametrize("which, left, clock", [(0, 36_000, "10:00:00"), (1, 0, "0:00")])
def test_every_number_stands_under_its_title_in_lines_of_at_most_100_characters(
    which, left, clock, unused
):
    """The largest as well as the smallest; columns that are not in use are not there."""
    used = {name: cell for name, cell in CELLS.items() if name not in unused}
    row = dict.fromkeys(NAMES) | {name: list(cell[1])[which] for name, cell in used.items()}
    titles = [*(title for title, _ in used.values()), "left"]
    texts = [*(list(cell[1].values())[which] for cell in used.values()), clock]
    header, line = log.header(unused), log.line(row, left, unused)
    assert header.split() == " ".join(titles).split() and line.split() == texts
    assert len(header) == len(line) <= 100
    for title, text in zip(titles, texts, strict=True):
        end = header.index(title) + len(title)
        assert line[:end].endswith(text) and line[end : end + 1] in (" ", "")


def test_what_was_not_measured_is_left_blank_and_shifts_nothing():
    """An epoch without validation."""
    missing = ("val_loss", "val_accuracy", "ema_accuracy", "train_accuracy")
    full, part = log.line(ROW, 61, ()), log.line(ROW | dict.fromkeys(missing), 61, ())
    assert len(part) == len(full)
    assert part.split() == ["7", "1.5e-03", "1.5000", "2.50", "3", "4,321", "25.0%", "1:01"]
    for text in part.split():
        assert part.index(f" {text}") == full.index(f" {text}")


# ---- log.csv ----


def test_the_log_is_a_table_in_full_precision():
    """A row an epoch, under the names; an empty cell is a number that was not measured."""
    history = [ROW | {"ema_accuracy": None, "train_loss": 1 / 3}, ROW | {"epoch": 8, "lr": 1e-30}]
    log.write_log("log.csv", history)
    with open("log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [NAMES, NAMES]
    found = [{k: float(v) if v else None for k, v in row.items()} for row in rows]
    assert found == history == log.read_log("log.csv")
    assert (
        Path("log.csv").read_bytes().count(b"\n") == 3 and b"\r" not in Path("log.csv").read_bytes()
    )


def test_the_log_is_written_whole_each_time():
    """A resumed run rewrites what a killed one had added; nothing is left beside it."""
    log.write_log("log.csv", [ROW, ROW])
    log.write_log("log.csv", [ROW])
    assert len(log.read_log("log.csv")) == 1 and list(tree()) == ["log.csv"]


def csv_text():
    log.write_log("log.csv", [ROW, ROW | {"epoch": 8, "val_loss": None}])
    return Path("log.csv").read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: ("\ufeff" + text).encode(),  # a byte-order mark
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: re.sub(r"([^,\n]+)", r'"\1"', text).encode(),
        lambda text: re.sub("$", ",note", text, flags=re.MULTILINE).rstrip(",note").encode(),
        lambda text: text.rstrip("\n").encode(),
    ],
    ids=["mark", "line ends", "quotes", "a column more", "no last line end"],
)
def test_a_log_that_a_spreadsheet_has_saved_is_read_as_before(change):
    text = csv_text()
    expected = log.read_log("log.csv")
    Path("log.csv").write_bytes(change(text))
    assert log.read_log("log.csv") == expected and expected[1]["val_loss"] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("val_loss", "loss").encode(),
        lambda text: text.replace(",", ";").encode(),
        lambda text: text.replace("0.75", "0,75").encode(),
        lambda text: text.replace("1.5", "n/a").encode(),
        lambda text: text[: text.rindex("8,") + 4].encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"\x89PNG\r\n\x1a\n\x00\x00",
        lambda text: text.replace("\n7,", "\n,").encode(),
    ],
    ids=[
        "renamed",
        "semicolons",
        "decimal comma",
        "text",
        "torn",
        "utf-16",
        "a picture",
        "no epoch",
    ],
)
def test_a_log_that_is_none_any_more_is_named(change):
    """One line: it costs a picture, and not the evaluation."""
    text = csv_text()
    Path("log.csv").write_bytes(change(text))
    with pytest.raises(ValueError, match=r"^log\.csv is not a log of train\.py any more$"):
        log.read_log("log.csv")


def test_a_log_that_is_not_there_is_another_matter():
    with pytest.raises(FileNotFoundError):
        log.read_log("log.csv")


# ---- The run ----


def a_run(
    config,
    vit_config,
    world=1,
    dtype=torch.float32,
    compiled=False,
    peak=1.23e12,
    sizes=(40, 20, 30),
    K=3,
    **versions,
):
    """What describe_run reads of a train.Run."""
    facts = {"device": "cpu (x86_64)", "torch": "2.14.0", "commit": "unknown"} | versions
    model = SimpleNamespace(parameters=lambda: [torch.empty(5_000_000), torch.empty(2, 3)])
    state = SimpleNamespace(model=model, dtype=dtype, compiled=compiled)
    train_set, val_set, test_images = ((range(n), None) for n in sizes)
    dataset = SimpleNamespace(test_images=test_images[0], classes=range(K))
    return SimpleNamespace(
        config=config,
        vit_config=vit_config,
        world=world,
        peak=peak,
        state=state,
        versions=facts,
        train_set=train_set,
        val_set=val_set,
        dataset=dataset,
    )


def test_the_model_is_described_by_what_makes_it():
    line = log.describe_model(ViTConfig())
    assert "32x32 pixels, patch 4: 64 patches + class token" in line
    assert "dim 192, depth 12, heads 3" in line and "\n" not in line
    assert "class token" not in log.describe_model(ViTConfig(pool="mean"))


def test_the_run_is_described_by_its_data_its_recipe_and_its_machine():
    """Numbers as they are, and nothing that is not so."""
    config = TrainConfig(epochs=7, batch_size=8, seed=5, lr=0.02, weight_decay=0.1)
    network = ViTConfig(8, 4, 3, 3, dim=8, depth=2, heads=2)
    text = log.describe_run(a_run(config, network), 35)
    assert "5,000,006 parameters" in text
    assert f"{network.flops_per_image / 1e6:,.1f} MFLOP" in text
    assert "cifar10: 40 training, 20 validation, 30 test images, 3 classes" in text
    assert "7 epochs, 35 steps of 8 images | seed 5" in text
    assert "adamw, peak lr 0.02, weight decay 0.1" in text
    assert "1 x cpu (x86_64), float32" in text and "compiled" not in text and "1.23 TFLOP/s" in text
    assert "torch 2.14.0" in text and "commit unknown" in text and "bias" not in text
    network = ViTConfig(relative_position_bias=True)
    text = log.describe_run(a_run(config, network, compiled=True, dtype=torch.bfloat16, world=4), 9)
    assert re.search(r"4 x cpu \(x86_64\), bfloat16, compiled\b", text)
    slow = a_run(TrainConfig(dtype="bfloat16"), network)
    assert "1 x cpu (x86_64), float32 in place of bfloat16\n" in log.describe_run(slow, 9)
    fast = a_run(TrainConfig(dtype="bfloat16"), network, dtype=torch.bfloat16)
    assert "1 x cpu (x86_64), bfloat16\n" in log.describe_run(fast, 9)
    assert "relative position bias" in text


def test_no_line_about_a_run_is_longer_than_100_characters():
    """On the largest machine with the longest name, with a network and data far from the usual."""
    huge = ViTConfig(1024, 16, 3, 21_841, 1280, 32, 16, 4.0, relative_position_bias=True)
    config = TrainConfig(dataset="cifar100", epochs=10_000, batch_size=65_536, seed=2**32 - 1)
    run = a_run(
        replace(config, lr=1.2345e-4, optimizer="muon"),
        huge,
        device="NVIDIA GeForce RTX 4090 Laptop GPU",
        torch="2.14.0.dev20251125+cu130",
        commit="0123456789ab-dirty",
        compiled=True,
        dtype=torch.bfloat16,
        world=128,
        peak=123_456e12,
        sizes=(14_197_122, 1_419_712, 1_000_000),
        K=21_841,
    )
    lines = [log.describe_model(huge), *log.describe_run(run, 123_456_789).splitlines()]
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    labels = [line[:9].strip() for line in lines]
    assert [label for label in labels if label] == ["model", "data", "recipe", "machine"]
    assert all(line[9] != " " for line in lines)


def test_the_start_is_described_by_the_loss_of_a_guess_and_the_end_of_the_last_sitting():
    """An untrained network guesses: ln K. What is resumed has an epoch, and a best if there is."""
    run = a_run(TrainConfig(epochs=9), ViTConfig(), K=21_841)
    run.epoch, run.best = 0, None
    text = log.describe_start(run, 9.98764)
    assert text.startswith("start    loss 9.9876 before") and "among 21841 classes" in text
    assert text.endswith(f"ln(21841) = {math.log(21_841):.4f}") and len(text) <= 100
    run.epoch = 1
    assert log.describe_start(run, 1.0) == "resumed  after epoch 1 of 9"
    run.best = {"epoch": 1, "accuracy": 0.87654}
    assert log.describe_start(run, 1.0) == "resumed  after epoch 1 of 9, best so far 87.65%"


# ---- How it goes on, and how it is stopped ----


@pytest.mark.parametrize("folder", [".", "..", "elsewhere"])
def test_a_hint_names_the_file_as_it_can_be_called_from_where_the_user_stands(
    folder, monkeypatch, here
):
    """By the shorter of its names; with no folder where none is needed."""
    monkeypatch.chdir(here if folder == "elsewhere" else HERE / folder)
    for name in ("train.py", "evaluate.py"):
        assert os.path.samefile(log.program(name), HERE / name)
    if folder == ".":
        assert log.program("train.py") == "train.py"
    names = str(HERE / "train.py"), os.path.relpath(HERE / "train.py")
    assert log.program("train.py") == min(names, key=len)


def test_the_command_that_continues_is_the_one_that_began_and_resume(monkeypatch):
    """Quoted for a shell, with --resume once, and torchrun where it was used."""
    monkeypatch.chdir(HERE)
    continued = log.command(["--out", "a b", "--resume"], 1)
    assert continued == "python train.py --out 'a b' --resume"
    assert log.command([], 4) == "torchrun --nproc_per_node=4 train.py --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on each of two machines
    assert log.command([], 4) == "torchrun --nproc_per_node=2 train.py --resume"
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "3"])
    expected = "python train.py --seed 3 --resume --grad-clip 1"
    assert log.command(None, 1, "--grad-clip", "1") == expected


def test_a_command_is_quoted_for_the_command_prompt_on_windows(monkeypatch):
    """Which knows no single quotes, and takes a backslash as it is. PowerShell reads it, too."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(os, "name", "nt")
    continued = log.command(["--out", "D:\\my runs\\a", "--data-dir", "D:\\pets"], 1)
    expected = 'python train.py --out "D:\\my runs\\a" --data-dir D:\\pets --resume'
    assert continued == expected


def test_a_hint_is_given_from_a_folder_that_is_gone_too(monkeypatch, here):
    """A scratch folder may be cleaned during the run."""
    (here / "scratch").mkdir()
    monkeypatch.chdir(here / "scratch")
    (here / "scratch").rmdir()
    assert log.program("train.py") == str(HERE / "train.py")


def test_a_hint_is_given_from_another_drive_of_windows_too(monkeypatch):
    def relpath(path):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    assert log.program("train.py") == str(HERE / "train.py")


def test_a_terminal_that_goes_away_is_no_reason_to_stop(monkeypatch):
    """As of a run that was started with nohup; but a reader that has had enough is one."""
    terminal, stream = os.openpty()
    with os.fdopen(stream, "w") as stream:
        os.close(terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        log.say("one")
        log.say("two")
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError):
            log.say("three")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


@pytest.fixture
def handlers():
    """The signals' handlers, which are put back."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield old
    for number, handler in old.items():
        signal.signal(number, handler)


def test_a_second_signal_counts_after_more_than_a_second_and_not_within_it(monkeypatch, handlers):
    """torchrun sends SIGTERM to processes that Ctrl-C has reached already; and a person who
    presses it again a while later means it, as the first may have been swallowed."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    assert log.listen_to_signals() == handlers
    for number, pause, stops in (
        (signal.SIGINT, 0.0, True),
        (signal.SIGTERM, 0.9, False),
        (signal.SIGTERM, 0.2, True),
        (signal.SIGINT, 1.1, True),
    ):
        clock.now += pause
        with pytest.raises(log.Stopped) if stops else contextlib.nullcontext() as caught:
            signal.raise_signal(number)
        assert not stops or caught.value.args == (number,)


def test_a_signal_that_is_ignored_stays_so(handlers):
    """A shell's script starts `train.py &` so; the Ctrl-C is meant for what runs in front."""
    for number in (signal.SIGINT, signal.SIGHUP):  # nohup ignores the latter
        signal.signal(number, signal.SIG_IGN)
    assert log.listen_to_signals() == {signal.SIGTERM: handlers[signal.SIGTERM]}
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(log.Stopped):
        signal.raise_signal(signal.SIGTERM)


def test_a_stop_is_not_swallowed_by_a_careless_except():
    assert issubclass(log.Stopped, BaseException) and not issubclass(log.Stopped, Exception)


def test_signals_are_left_alone_outside_the_main_thread(handlers):
    """Python would raise a ValueError there: a run in a thread (of Gradio, say) is a run, too."""
    found = []
    thread = threading.Thread(target=lambda: found.append(log.listen_to_signals()))
    thread.start()
    thread.join()
    assert found == [{}]
    assert {number: signal.getsignal(number) for number in handlers} == handlers


# ---- A program ----


def start(body, command="exec {python}", **variables):
    """A process whose main() has this body, run by a shell. It has only the source it needs:
    importing torch would take seconds."""
    lines = ["import contextlib, os, signal, sys, threading, time", "from tqdm import tqdm"]
    lines += [inspect.getsource(log.silence), inspect.getsource(log.run_program), "def main():"]
    lines += [f"    {line}" for line in body.splitlines()] + ["sys.exit(run_program(main))"]
    Path("program.py").write_text("\n".join(lines))
    command = command.replace("{python}", f"{sys.executable} program.py")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | variables
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True)


def test_a_program_ends_with_what_main_returns():
    for body, code in (("return 0", 0), ("return 3", 3), ("sys.exit(2)", 2)):
        done = start(f"print('said')\n{body}")
        assert (done.returncode, done.stdout, done.stderr) == (code, b"said\n", b"")


def test_a_bar_leaves_no_thread_that_the_end_would_wait_for():
    """It waited for good with tqdm 4.67, where a run's terminal had stalled and then closed."""
    done = start("list(tqdm(range(2)))\nprint(threading.active_count())")
    assert done.returncode == 0 and done.stdout == b"1\n"


def test_a_message_is_one_line_whatever_breaks_it():
    """A file name may hold a carriage return."""
    assert log.one_line("a\rb\n c  d\u2028e") == "a b c  d e"


def test_a_bug_keeps_its_traceback():
    done = start("print('said')\nraise KeyError('x')")
    assert done.returncode == 1 and b"KeyError: 'x'" in done.stderr and done.stdout == b"said\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "body",
    [
        "for i in range(10 ** 5): print(i)\nreturn 0",
        "time.sleep(0.2)\nprint('late')\nreturn 0",
        "time.sleep(0.2)\nprint('late')\nsys.exit(2)",
        "time.sleep(0.2)\nprint('late')\nprint('late', file=sys.stderr)\nsys.exit(2)",
        "time.sleep(0.2)\nprint('late', file=sys.stderr)\nreturn 0",
    ],
    ids=["much", "at the end", "before an exit", "on both streams", "on stderr"],
)
def test_a_reader_that_goes_away_ends_the_program_quietly(body, unbuffered):
    """As in `| head -1`. The shell's code for a broken pipe; nothing on stderr, not even Python's
    own complaint at the end."""
    err = "2>&1" if "stderr" in body else "2>err"
    command = f"{{python}} {err} | true; exit ${{PIPESTATUS[0]}}"
    done = start(body, command, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 141 and not done.stdout + done.stderr
    assert err == "2>&1" or not Path("err").read_bytes()


def test_an_interrupt_ends_the_program_quietly():
    done = start("print('said')\nos.kill(os.getpid(), signal.SIGINT)\nsignal.pause()")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"said\n", b"")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_name_that_the_terminal_cannot_print_is_printed_in_another_way(encoding):
    """Classes may be named in any script."""
    body = "for stream in (sys.stdout, sys.stderr): print('\\u732b', file=stream)\nreturn 0"
    done = start(body, PYTHONIOENCODING=encoding)
    expected = "\u732b\n".encode(encoding, errors="backslashreplace")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, expected)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_terminal_is_no_reason_to_stop(closed):
    """As under cron, or nohup: nothing is said, and the work is done."""
    done = start("print('said')\nopen('done', 'w').close()\nreturn 3", f"exec {{python}} {closed}")
    assert done.returncode == 3 and Path("done").exists() and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("code", [0, 3])
def test_a_full_disk_below_the_output_is_one_line(code):
    """As of `> file`; nothing more on stderr, not even Python's own complaint at the end."""
    done = start(f"print('said')\nreturn {code}", "exec {python} > /dev/full")
    assert done.returncode == (code or 2) and done.stderr.count(b"\n") == (not code)
    assert code or done.stderr == b"error: [Errno 28] No space left on device\n"
    done = start(f"print('said')\nreturn {code}", "exec {python} > /dev/full 2>&1")
    assert done.returncode == (code or 2)


def test_a_notebook_whose_output_is_no_file_runs_the_program_too(monkeypatch):
    """As by `%run train.py`: its stream cannot be reconfigured."""

    class Stream:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            """There is nothing to flush."""

    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert log.run_program(lambda: print("said") or 0) == 0 and stream.text == "said\n"
