"""
The specification of train.py: every test is a sentence about a run, its docstring the formula or
the reason.

    1 an epoch                  2 every flag counts   3 a run that diverges
    4 validation and the best   5 setting up          6 resume
    7 saves                     8 ending well         9 the finish
   10 bad input                11 real processes     12 a GPU that is not there
   13 the files

Two habits make the sentences bite:

- Whole checkpoints are compared, every tensor and number of them, to the bit. A comparison of
  weights alone forgives a forgotten scaler or average.
- Everything goes through main(argv), in this process, on 60 pictures of 8x8 pixels and a network
  of one or two small blocks. Only signals, kills and torchrun start processes of their own.
"""

import ast
import contextlib
import copy
import errno
import itertools
import json
import math
import multiprocessing
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import augment
import checkpoint
import data
import evaluate
import log
import machine
import optim
import plots
import recipe
import train
from recipe import TrainConfig
from testing import (
    ALONE,
    DATASET,
    FSYNC,
    FULL,
    HERE,
    PLOTS,
    TINY,
    WALL_CLOCK,
    Kill,
    contents,
    difference,
    flat,
    kill,
    make_dataset,
    on_call,
    outcome,
    pretend,
    read_csv,
    run,
    save_pictures,
    tree,
    weights,
)
from vit import MultiHeadAttention, TransformerEncoderBlock, ViTConfig

pytestmark = pytest.mark.usefixtures("tiny", "here")


def main(*words):
    """The exit code of `python train.py words`, in this process."""
    try:
        return train.main([*map(str, words)])
    except SystemExit as exit:
        return exit.code


def prepare(*flags, rank=0, world=1):
    words = [*TINY, *map(str, flags)]
    return train.prepare(*recipe.parse(words, recipe.make_parser()), rank, world)


def saved(path="out/last.pt"):
    return torch.load(path, weights_only=True)


class Clock:
    """A false clock, in seconds, that moves when an epoch or a save is said to take its time."""

    def __init__(self, monkeypatch):
        self.now, self.patch = 1000.0, monkeypatch
        false = SimpleNamespace(monotonic=lambda: self.now, perf_counter=time.perf_counter)
        monkeypatch.setattr(train, "time", false)
        monkeypatch.setattr(log, "time", false)

    def takes(self, name, *seconds):
        """Every call of train.<name> takes so long; of several numbers, each call the next."""
        real, durations = getattr(train, name), itertools.cycle(seconds)

        def slow(*args, **kwargs):
            self.now += next(durations)
            return real(*args, **kwargs)

        self.patch.setattr(train, name, slow)


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


# ---- 1 An epoch ----


def spy_on_steps(monkeypatch, look):
    """look(state, images, targets) before every train_step; the list of what it returned."""
    real, seen = optim.train_step, []

    def step(state, images, targets, config):
        seen.append(look(state, images, targets))
        return real(state, images, targets, config)

    monkeypatch.setattr(optim, "train_step", step)
    return seen


def poison(monkeypatch, steps, scale=2.0**10):
    """A CPU scaler that grows often; an infinite gradient in these of every 5 steps."""
    real = optim.build_state

    def build_state(*args):
        state, calls = real(*args), itertools.count()
        state.scaler = torch.amp.GradScaler("cpu", scale, growth_interval=2)
        state.model.head.bias.register_hook(
            lambda g: g * math.inf if next(calls) % 5 in steps else g
        )
        return state

    monkeypatch.setattr(optim, "build_state", build_state)


def test_the_row_of_an_epoch_is_the_mean_over_its_steps(monkeypatch):
    """Loss and gradient norm, as train_step returned them; the learning rate of the last step."""
    real, seen, rates = optim.train_step, [], []

    def step(state, *rest):
        rates.append(state.scheduler.get_last_lr()[0])
        seen.append(real(state, *rest))
        return seen[-1]

    monkeypatch.setattr(optim, "train_step", step)
    assert run() == 0
    for i, row in enumerate(read_csv()):
        loss, norm = torch.tensor(seen[5 * i : 5 * i + 5], dtype=torch.float64).mean(0).tolist()
        assert float(row["train_loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-6)
        assert float(row["lr"]) == rates[5 * i + 4] and row["skipped_steps"] == "0"


def test_throughput_and_mfu_follow_from_the_clock(plain):
    """MFU = images/s x 3 forward passes / measured peak (1e12 here)."""
    # P = 4, N = 5, D = 8, one block, K = 3, a multiply-add is 2
    forward = 2 * (4 * 48 * 8 + (5 * (4 * 64 + 2 * 8 * 32) + 2 * 25 * 8) + 8 * 3)
    for row in read_csv(plain / "log.csv"):
        speed = float(row["images_per_second"])
        assert float(row["mfu"]) == pytest.approx(speed * 3 * forward / 1e12, rel=1e-9)
        assert 40 / speed < float(row["seconds"])


def test_the_throughput_counts_the_augmentation(monkeypatch):
    """100 s of it, by a false clock that stands still otherwise: 40 images in 100 s."""
    clock, real = [0.0], augment.augment

    def slow(*args):
        clock[0] += 100
        return real(*args)

    monkeypatch.setattr(augment, "augment", slow)
    false = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: clock[0])
    monkeypatch.setattr(train, "time", false)
    assert run() == 0
    assert [float(row["images_per_second"]) for row in read_csv()] == [0.4, 0.4]


def test_the_throughput_is_that_of_all_processes_together(monkeypatch):
    """An epoch of 40 images in 10 s by a false clock; and MFU is of the peak of all."""
    monkeypatch.setattr(train.dist, "all_reduce", lambda _: None)
    now = itertools.count(0, 10)
    false = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: next(now))
    monkeypatch.setattr(train, "time", false)
    rows = [train.train_epoch(replace(prepare(), world=world, peak=1e12), 1) for world in (1, 4)]
    assert [row["images_per_second"] for row in rows] == [4.0, 4.0]
    assert rows[0]["mfu"] == rows[1]["mfu"] > 0


def test_overflowing_gradients_alone_do_not_stop_a_float16_run(monkeypatch):
    """They are skipped and counted; the log's gradient norm is of the steps that were taken."""
    poison(monkeypatch, steps=(1, 4), scale=0.5)  # however small the scale is by then
    assert run("--dtype", "float16") == 0
    rows = read_csv()
    assert [row["skipped_steps"] for row in rows] == ["2", "2"]
    assert all(0 < float(row["grad_norm"]) < math.inf for row in rows)
    assert saved()["scheduler"]["last_epoch"] == 6


def test_an_epoch_whose_every_step_is_skipped_has_a_gradient_norm_of_zero(monkeypatch):
    """A mean over nothing would be nan."""
    poison(monkeypatch, steps=range(5))
    assert run("--dtype", "float16") == 0
    assert [(r["skipped_steps"], r["grad_norm"]) for r in read_csv()] == [("5", "0.0")] * 2


def test_gradients_that_overflow_at_every_loss_scale_end_a_float16_run_too(monkeypatch, capsys):
    """Each skipped step halves the scale, down to 0, from which it would not come back: the run
    would go on to its last epoch and learn nothing."""
    with monkeypatch.context() as patch:
        poison(patch, steps=range(100))
        assert run("--dtype", "float16", "--epochs", 5) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "epoch 3: the gradients overflow" in line and "out/last.pt holds epoch 2 of 5" in line
    assert "--dtype float32 may help" in line and line.endswith(" --resume --dtype float32")
    assert main(*continuing(line)) == 0
    assert {row["skipped_steps"] for row in read_csv()[2:]} == {"0"}


def test_dropout_draws_anew_in_every_epoch_and_for_every_seed(monkeypatch):
    """Its stream is the global one; before the first step it is a function of (seed, epoch)."""
    seen = spy_on_steps(monkeypatch, lambda *_: torch.get_rng_state())
    for i, seed in enumerate((0, 1, 0)):
        torch.manual_seed(i)
        assert run("--seed", seed, out=i) == 0
    starts = [state.numpy().tobytes() for state in seen[::5]]  # of epochs 1 and 2, three times
    assert starts[:2] == starts[4:] and len(set(starts)) == 4


def test_each_process_draws_dropout_masks_of_its_own(monkeypatch):
    """torch's CPU generator reads the low 32 bits of its seed: they must differ between ranks."""
    ours, seeds = prepare(), set()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.add(seed % 2**32))
    monkeypatch.setattr(augment, "epoch_batches", kill)
    for rank in range(8):
        for epoch in range(1, 4):
            with pytest.raises(Kill):
                train.train_epoch(replace(ours, rank=rank, world=8), epoch)
    assert len(seeds) == 8 * 3


def test_processes_take_equal_shares_of_the_same_batch(monkeypatch):
    """Disjoint, and together the batch that one process would have seen."""
    monkeypatch.setattr(train.dist, "all_reduce", lambda _: None)
    shares = {}
    for world in (1, 4):
        for rank in range(world):
            with monkeypatch.context() as patch:
                seen = spy_on_steps(patch, lambda state, *batch: batch)
                train.train_epoch(replace(prepare(), rank=rank, world=world), 1)
                shares[world, rank] = seen
    for step, (images, targets) in enumerate(shares[1, 0]):
        parts = [shares[4, rank][step] for rank in range(4)]
        assert torch.equal(torch.cat([x for x, _ in parts]), images)
        assert torch.equal(torch.cat([t for _, t in parts]), targets)


def test_an_epoch_has_a_bar_on_a_terminal_and_nowhere_else(monkeypatch, capsys):
    """It would flood a notebook or a file; and stderr may be closed."""
    assert run() == 0
    assert not capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        assert run(out="seen") == 0
        assert "epoch 1" in capsys.readouterr().err
        patch.setattr(train.dist, "all_reduce", lambda _: None)
        train.train_epoch(replace(prepare("--out", "new"), rank=1, world=2), 1)  # rank 0 has it
        assert not capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    assert run(out="closed") == 0


# ---- 2 Every flag counts ----

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
    "mix_prob": 0.5,
    "mix_until": 0.0,
    "label_smoothing": 0.1,
    "ema_decay": 0.5,
    "eval_every": 2,
    "seed": 1,
    "dtype": "bfloat16",
    "image_size": 4,
    "patch_size": 2,
    "dim": 16,
    "depth": 2,
    "heads": 4,
    "mlp_ratio": 2.0,
    "dropout": 0.3,
    "attn_dropout": 0.3,
    "pool": "mean",
    "relative_position_bias": True,
}
# What the data decide, or the sitting: see the tests below and those of parts 6 to 8.
NO_RECIPE = {"dataset", "data_dir", "download_url", "out", "resume", "save_every", "max_minutes"}
NO_RECIPE |= {"device", "compile", "deterministic", "drop_path", "in_channels", "num_classes"}


def flag(name, value):
    return ["--" + name.replace("_", "-"), *([] if value is True else [value])]


def test_no_flag_is_forgotten_here():
    names = {field.name for config in (TrainConfig, ViTConfig) for field in fields(config)}
    assert names == set(OTHER) | NO_RECIPE


@pytest.mark.parametrize("name", OTHER)
def test_every_flag_of_the_recipe_changes_the_outcome_of_a_run(name, begun):
    """Alone, and in numbers: other weights or another log, after the first epoch."""
    assert run("--max-minutes", 1e-9, *flag(name, OTHER[name])) == 0
    assert difference(outcome("out/last.pt"), outcome(begun / "last.pt"))


def test_drop_path_changes_the_outcome_of_a_run_of_two_blocks():
    """The first block never drops."""
    for rate in (0.0, 0.5):
        assert run("--depth", 2, "--drop-path", rate, out=rate) == 0
    assert difference(outcome("0.0/last.pt"), outcome("0.5/last.pt"))


def test_crop_resized_is_a_third_kind_of_crop(plain):
    for crop in ("none", "resized"):
        assert run("--crop", crop, out=crop) == 0
    assert difference(outcome("none/last.pt"), outcome("resized/last.pt"))
    assert difference(outcome("resized/last.pt"), outcome(plain / "last.pt"))


def test_where_the_data_lie_reaches_the_loader(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load", lambda *args, **_: seen.append(args) or DATASET)
    assert run("--data-dir", "d", "--download-url", "http://mirror", "--dataset", "cifar100") == 0
    assert seen == [("cifar100", "d", 8, "http://mirror")]


def test_compiling_leaves_no_trace_in_the_checkpoint(monkeypatch, plain):
    """torch.compile's wrapper would prefix every name with _orig_mod."""
    compiled = []

    def compile_(call, **_):
        compiled.append(getattr(call, "__self__", None))
        return lambda *args: call(*args)

    monkeypatch.setattr(torch, "compile", compile_)
    assert run("--compile") == 0
    assert sum(isinstance(module, TransformerEncoderBlock) for module in compiled) == 1
    assert difference(outcome("out/last.pt"), outcome(plain / "last.pt")) is None
    compiled.clear()
    assert run("--no-compile", out="b") == run(out="c") == 0 and not compiled


def test_without_a_compiler_a_run_goes_on_unless_it_was_asked_for_one(monkeypatch, capsys):
    """One line either way, and not the compiler's hundred."""

    def compile_(*_, **__):
        raise RuntimeError("no C++ compiler\nand a hundred lines more")

    monkeypatch.setattr(torch, "compile", compile_)
    assert run("--compile") == 2 and not tree()
    [line] = capsys.readouterr().err.splitlines()
    assert "no C++ compiler" in line and "--compile" in line
    monkeypatch.setattr(machine, "can_compile", lambda device: True)  # the default, on CUDA
    assert run() == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "no C++ compiler" in line


def test_deterministic_asks_torch_for_it_and_only_then(monkeypatch):
    """cuBLAS reads its variable when CUDA starts, so it has to be set before."""
    seen = []

    def spy(*_):
        env = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        seen.append((torch.are_deterministic_algorithms_enabled(), env))

    monkeypatch.setattr(train, "train", spy)
    assert run() == run("--deterministic") == 0
    assert seen == [(False, None), (True, ":4096:8")]


@pytest.mark.parametrize("batch_size", [8, 9])  # 40 images: five batches, or four and a rest
def test_the_rate_reaches_its_floor_in_the_last_step_of_the_run(batch_size):
    """1 / 250,000 of the peak. Were the schedule longer than the run, it would end too high."""
    assert run("--batch-size", batch_size, "--lr", 0.01) == 0
    assert float(read_csv()[-1]["lr"]) == pytest.approx(0.01 / 25 / 1e4)


# ---- 3 A run that diverges ----


def continuing(text):
    """The command behind "continue with: ", as arguments of main(); the file is where it says."""
    words = shlex.split(text.rpartition("continue with: ")[2])
    assert words[0] == "python" and os.path.samefile(words[1], train.__file__)
    assert words.count("--resume") == 1
    return words[2:]


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
    numbers = torch.tensor(loss), torch.tensor(norm)
    on_call(monkeypatch, optim, "train_step", 3, lambda *_: numbers)
    assert run("--resume", "--epochs", 3, "--dtype", dtype) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "epoch 2, step 3 of 5" in line and f"{loss:g}" in line and "holds epoch 1 of 3" in line
    assert tree() == before


def test_nan_pixels_are_noticed_by_the_real_step(monkeypatch, capsys):
    real = optim.train_step
    nan = lambda state, images, *rest: real(state, images * math.nan, *rest)  # noqa: E731
    on_call(monkeypatch, optim, "train_step", 7, nan)
    assert run() == 1
    assert "epoch 2, step 2 of 5: the loss is nan" in capsys.readouterr().err


def nan_weight(monkeypatch):
    """The last step of the second epoch has a good loss and breaks a weight."""

    def step(state, *_):
        with torch.no_grad():
            state.model.pos_embed[0, 0, 0] = math.nan
        return torch.tensor(1.0), torch.tensor(1.0)

    on_call(monkeypatch, optim, "train_step", 10, step)


def nan_validation(monkeypatch, found=math.nan):
    """The weights are finite, and what they compute in the second epoch is not."""
    real = train.validate

    def validate(run, model, part):
        loss, accuracy = real(run, model, part)
        is_second = run.epoch == 1 and part is run.val_set
        return (found if is_second else loss), accuracy

    monkeypatch.setattr(train, "validate", validate)


def inf_validation(monkeypatch):
    nan_validation(monkeypatch, math.inf)


@pytest.mark.parametrize(
    "fault, eval_every, dtype",
    [
        (nan_weight, 3, "float32"),
        (nan_weight, 3, "float16"),
        (nan_weight, 1, "float32"),
        (nan_validation, 1, "float32"),
        (inf_validation, 1, "float32"),
    ],
)
def test_neither_nan_weights_nor_a_nan_validation_loss_reach_the_disk(
    fault, eval_every, dtype, monkeypatch, capsys
):
    """Else the last good checkpoint would be a bad one, and no resume would ever be finite."""
    flags = ("--epochs", 3, "--eval-every", eval_every, "--dtype", dtype)
    with monkeypatch.context() as patch:
        fault(patch)
        assert run(*flags) == 1
    [line] = capsys.readouterr().err.splitlines()
    found = "inf" if fault is inf_validation else "nan"
    assert "epoch 2" in line and f" is {found}" in line and "holds epoch 1 of 3" in line
    rescue = "--dtype float32" if dtype == "float16" else "--grad-clip 1 --lr LOWER"
    assert f"{rescue} may help" in line and line.endswith(f"--resume {rescue}")
    last = saved()
    tensors = [x for x in flat(last).values() if torch.is_tensor(x) and x.is_floating_point()]
    assert last["epoch"] == len(read_csv()) == 1 and all(x.isfinite().all() for x in tensors)
    assert eval_every == 3 or saved("out/best.pt")["epoch"] == 1
    assert run(*flags, "--resume") == 0


def test_a_run_that_diverged_goes_on_with_what_its_hint_says(capsys):
    """Really: a rate of 1e18 in the second epoch. The same flags again end in the same place."""
    assert run("--max-minutes", 1e-9, out="my run") == 0
    wild = ("--resume", "--lr", 1e18)
    assert run(*wild, out="my run") == 1
    assert run(*wild, out="my run") == 1
    words = continuing(capsys.readouterr().err.splitlines()[-1])
    assert words[-4:] == ["--grad-clip", "1", "--lr", "LOWER"]
    assert run(*wild, "--grad-clip", 0.5, out="my run") == 1  # which is not to be loosened
    clipped = continuing(capsys.readouterr().err.splitlines()[-1])
    assert clipped.count("--grad-clip") == 1 and clipped[-2:] == ["--lr", "LOWER"]
    assert main(*words[:-1], "0.001") == 0
    last = saved("my run/last.pt")
    assert last["epoch"] == 2 and last["train"]["lr"] == 0.001 and last["train"]["grad_clip"] == 1


def test_a_run_that_diverges_before_its_first_save_starts_again_with_its_hint(capsys):
    assert run("--lr", 1e18) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "no epoch is saved in out" in line
    assert main(*continuing(line)[:-1], "0.001") == 0


def test_a_lower_rate_given_on_resume_scales_the_rest_of_the_schedule(plain):
    """And is that of the run from then on, without being typed again."""
    flags = ("--epochs", 4, "--max-minutes", 1e-9)
    assert run(*flags) == 0
    assert run(*flags, "--resume", "--lr", 0.001) == 0
    assert main("--resume") == 0
    assert run("--epochs", 4, out="straight") == 0
    ours, theirs = ([float(r["lr"]) for r in read_csv(f"{o}/log.csv")] for o in ("out", "straight"))
    factors = [a / b for a, b in zip(ours, theirs, strict=True)]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.1])


# ---- 4 Validation and the best ----


def script(monkeypatch, accuracies):
    """Let the epochs find these accuracies; returns a list that collects their weights."""
    real, kept = train.validate_epoch, []
    monkeypatch.setattr(train, "validate", lambda run, *_: (1.0, accuracies[run.epoch]))

    def validate_epoch(run, row):
        kept.append(weights(run.state.model))
        real(run, row)

    monkeypatch.setattr(train, "validate_epoch", validate_epoch)
    return kept


def test_the_numbers_of_a_validation_are_those_of_clean_images():
    """On mixed batches they would mean nothing. Each is that of its own weights and images; the
    validation loss is the model's, not its average's."""
    flags = "--epochs 4 --mixup 0 --cutmix 0 --lr 0.03 --pct-start 0.9 --ema-decay 0.99"
    pairs = set(itertools.combinations(("train_accuracy", "val_accuracy", "ema_accuracy"), 2))
    for seed in range(2, 6):  # equal numbers would prove nothing, so not one run but four
        assert run(*flags.split(), "--seed", seed, out=f"out{seed}") == 0
        last = checkpoint.load_checkpoint(f"out{seed}/last.pt")
        row, losses = last["history"][-1], {}
        train_index, val_index = data.split(DATASET.train_labels, 20, seed)
        for name, kind, index in (
            ("train_accuracy", "model", train_index),
            ("val_accuracy", "model", val_index),
            ("ema_accuracy", "ema", val_index),
        ):
            model = checkpoint.build_model({**last, "ema": last[kind]})
            x = data.normalize(DATASET.train_images[index], DATASET.mean, DATASET.std)
            logits, labels = model(x), DATASET.train_labels[index]
            accuracy = (logits.argmax(1) == labels).double().mean().item()
            assert row[name] == pytest.approx(accuracy)
            losses[name] = F.cross_entropy(logits, labels).item()
        assert row["val_loss"] == pytest.approx(losses["val_accuracy"], rel=1e-5)
        assert abs(row["val_loss"] - losses["ema_accuracy"]) > 1e-4
        pairs = {(a, b) for a, b in pairs if row[a] == row[b]}
    assert not pairs


def test_a_validation_computes_in_the_precision_of_the_run():
    """Else it would take twice as long, and measure another model than is trained."""
    assert run("--dtype", "bfloat16") == 0
    last = checkpoint.load_checkpoint("out/last.pt")
    _, index = data.split(DATASET.train_labels, 20, 0)
    x = data.normalize(DATASET.train_images[index], DATASET.mean, DATASET.std)
    losses = []
    for low in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = checkpoint.build_model(last)(x)
        losses.append(F.cross_entropy(logits.float(), DATASET.train_labels[index]).item())
    assert losses[0] != losses[1] and last["history"][-1]["val_loss"] == losses[0]


def test_validation_changes_nothing():
    """It draws no random number and leaves the model in train mode."""
    for every in (1, 3):
        assert run(*FULL, "--eval-every", every, out=every) == 0
    a, b = (contents(f"{every}/last.pt") for every in (1, 3))
    kept = {k for k in a if re.match("/(model|ema|optimizer|scaler|scheduler)/", k)}
    assert len(kept) > 50
    assert difference({k: a[k] for k in kept}, {k: b[k] for k in kept}) is None


@pytest.mark.parametrize("save_every", [1, 4])
def test_best_holds_the_weights_of_the_first_epoch_with_the_highest_accuracy(
    save_every, monkeypatch
):
    """Not of the last one with it, and not the weights at the time of saving."""
    kept = script(monkeypatch, [0.2, 0.5, 0.5, 0.1])
    assert run("--epochs", 4, "--save-every", save_every) == 0
    best, in_last = saved("out/best.pt"), saved()["best"]
    for found in (best, in_last):
        assert (found["epoch"], found["accuracy"]) == (2, 0.5)
        assert difference(dict(found["model"]), kept[1]) is None


def test_unvalidated_epochs_are_no_candidates(monkeypatch):
    """With --eval-every 2 of 5 epochs: 2, 4 and, being the last, 5."""
    script(monkeypatch, [0.9, 0.2, 0.9, 0.3, 0.3])
    assert run("--epochs", 5, "--eval-every", 2) == 0
    assert [row["val_accuracy"] for row in read_csv()] == ["", "0.2", "", "0.3", "0.3"]
    best = saved("out/best.pt")
    assert (best["epoch"], best["accuracy"]) == (4, 0.3)


def test_the_average_is_what_is_chosen_and_kept(monkeypatch):
    """Its accuracy chooses the epoch, and evaluation rebuilds it."""
    real, averages = train.validate, []

    def validate(run, model, part):
        if model is run.state.ema:
            averages.append(weights(model))
            return 0.0, [0.1, 0.9, 0.3][run.epoch]  # run.epoch: epochs done before this one
        return real(run, model, part)[0], 1.0 - run.epoch / 10

    monkeypatch.setattr(train, "validate", validate)
    assert run("--ema-decay", 0.9, "--epochs", 3) == 0
    best, last = (checkpoint.load_checkpoint(f"out/{name}.pt") for name in ("best", "last"))
    assert (best["epoch"], best["accuracy"]) == (2, 0.9)
    assert [row["ema_accuracy"] for row in last["history"]] == [0.1, 0.9, 0.3]
    assert difference(weights(checkpoint.build_model(best)), averages[1]) is None
    assert difference(weights(checkpoint.build_model(last)), averages[2]) is None
    assert difference(averages[2], dict(last["model"]))


# ---- 5 Setting up ----


UNSPLIT = [word for word in TINY if word not in ("--val-size", "20")]


def test_all_training_images_may_be_one_batch():
    """As of a handful of pictures, where nobody gave a size."""
    assert run("--batch-size", 40) == 0
    assert main(*UNSPLIT, "--batch-size", 45, "--out", "b") == 0


def test_validation_images_are_held_out_of_the_training_set():
    """By the seed, stratified as data.split() does it, and none is in both parts."""
    ours = prepare("--seed", 3)
    parts = zip((ours.train_set, ours.val_set), data.split(DATASET.train_labels, 20, 3))
    for (images, labels), index in parts:
        assert torch.equal(images, DATASET.train_images[index])
        assert torch.equal(labels, DATASET.train_labels[index])
    assert len(ours.train_set[0]) == 40


def test_a_dataset_that_brings_validation_images_loses_none_of_its_others(monkeypatch):
    part = {"val_images": DATASET.test_images[:7], "val_labels": DATASET.test_labels[:7]}
    monkeypatch.setattr(data, "load", lambda *_, **__: replace(DATASET, **part))
    ours = train.prepare(*recipe.parse(UNSPLIT, recipe.make_parser()), 0, 1)

    def pairs(images, labels):
        return sorted((*x.flatten().tolist(), label) for x, label in zip(images, labels.tolist()))

    assert pairs(*ours.train_set) == pairs(DATASET.train_images, DATASET.train_labels)
    assert pairs(*ours.val_set) == pairs(*part.values())
    assert main(*UNSPLIT, "--max-minutes", 1e-9) == main("--resume") == 0
    assert saved()["train"]["val_size"] == 7


def test_the_share_of_the_images_that_is_held_out_is_kept_in_the_checkpoint():
    """Of 60 images a quarter, unless it is said."""
    assert main(*UNSPLIT, "--max-minutes", 1e-9) == 0
    assert saved()["train"]["val_size"] == 15


def test_the_start_is_said_before_the_first_epoch(capsys):
    """The untrained model's loss on validation images, beside that of a guess."""
    ours = prepare()
    *_, start, header = capsys.readouterr().out.splitlines()
    loss, _ = train.validate(ours, ours.state.model, ours.val_set)
    assert f"{loss:.4f}" in start and f"{math.log(3):.4f}" in start
    assert header == log.header(ours.unused)


@pytest.mark.parametrize(
    "flags, used",
    [
        ("", []),
        ("--ema-decay 0.9", ["ema acc"]),
        ("--dtype float16", ["skipped"]),
        ("--dtype float16 --ema-decay 0.9", ["ema acc", "skipped"]),
    ],
)
def test_the_screen_has_only_the_columns_in_use(flags, used, capsys):
    prepare(*flags.split())
    titles = capsys.readouterr().out.splitlines()[-1]
    assert [title for title in ("ema acc", "skipped") if title in titles] == used


def test_without_an_accelerator_the_full_recipe_stops_at_once(monkeypatch, capsys):
    """One line that says what it would take, and the ways to go on; no data are loaded for it, and
    nothing is written."""
    pretend(monkeypatch, None)
    monkeypatch.setattr(data, "load", kill)
    assert main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(
        x in line for x in ("300 epochs", "--preset laptop", "--preset demo", "--device cpu")
    )
    assert "3.0e+16" in line  # 300 epochs x 45,000 images x 3 passes x 730 MFLOP
    assert main("--val-size=45000") == 2
    assert "100 epochs of 5,000 images" in capsys.readouterr().err and not tree()
    with pytest.raises(Kill):  # a few minutes are no reason to stop
        main("--val-size=49000", "--epochs=10")


def test_without_an_accelerator_hours_of_any_data_are_refused_once_they_are_counted(
    monkeypatch, capsys
):
    """Of CIFAR alone the number is known before."""
    pretend(monkeypatch, None)
    monkeypatch.setattr(train, "train", kill)
    assert run("--device", "auto", "--epochs", 10**9) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "1000000000 epochs of 40 images" in line and not tree()


def test_the_train_accuracy_is_of_no_more_than_2000_images(monkeypatch):
    """All of them would take as long as a third of the epoch itself."""
    sizes, real = [], train.validate
    monkeypatch.setattr(data, "load", lambda *_, **__: make_dataset(n=2_100))
    monkeypatch.setattr(train, "validate", lambda r, m, p: sizes.append(len(p[0])) or real(r, m, p))
    assert run("--batch-size", 1_000, "--epochs", 1) == 0
    assert sizes == [20, 20, 2_000]


@pytest.fixture
def joined(monkeypatch):
    """The other processes are as far, and of the same mind."""

    def all_gather_object(seen, mine):
        seen[:] = [mine] * len(seen)

    monkeypatch.setattr(train.dist, "all_gather_object", all_gather_object)
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(train.dist, name, lambda *_, **__: None)


@pytest.mark.parametrize("rank, order", [(0, ["load", "barrier"]), (1, ["barrier", "load"])])
def test_the_first_process_gets_the_data_before_the_others_do(rank, order, joined, monkeypatch):
    """It downloads and decodes for all."""
    seen, load = [], data.load
    monkeypatch.setattr(train.dist, "barrier", lambda: seen.append("barrier"))
    monkeypatch.setattr(data, "load", lambda *args: seen.append("load") or load(*args))
    prepare(rank=rank, world=2)
    assert seen == order


@pytest.mark.parametrize("other", ["run", "pictures", "network", "flags"])
def test_processes_that_see_different_runs_flags_or_images_are_refused(
    other, plain, joined, monkeypatch
):
    """On two machines with a disk each: only the first's has the run, which the other would begin
    anew. They averaged the gradients of two different models, and saved them."""
    shutil.copytree(plain, "out")

    def all_gather_object(seen, mine):
        run, pictures, network, flags = mine
        its = {"run": 0, "pictures": "b", "network": None, "flags": replace(flags, lr=9.0)}[other]
        theirs = {"run": run, "pictures": pictures, "network": network, "flags": flags, other: its}
        seen[:] = [mine, tuple(theirs.values())]

    assert prepare("--resume", world=2).epoch == 2
    monkeypatch.setattr(train.dist, "all_gather_object", all_gather_object)
    with pytest.raises(ValueError, match="--out must lie on a disk that all of them share"):
        prepare("--resume", world=2)


def test_processes_on_gpus_that_compute_in_different_dtypes_are_refused(joined, monkeypatch):
    """Of a mean of scaled and unscaled gradients half would be lost."""

    def all_gather_object(seen, mine):
        seen[:] = [mine, torch.float16 if isinstance(mine, torch.dtype) else mine]

    monkeypatch.setattr(train.dist, "all_gather_object", all_gather_object)
    with pytest.raises(ValueError, match="give --dtype float32"):
        prepare(world=2)


def test_processes_may_find_the_same_run_and_images_in_other_places(joined, monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "all_see", lambda value, _: seen.append(value) or True)
    for place in ("a", "b"):
        prepare("--out", place, "--data-dir", place, world=2)
    assert seen[:2] == seen[2:]


def test_the_hundred_percent_of_mfu_is_the_peak_of_all_processes_together(joined):
    assert [prepare(world=world).peak for world in (1, 4)] == [1e12, 4e12]


def test_one_process_may_be_said_by_empty_variables(monkeypatch):
    """As some launchers leave them."""
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    assert run() == 0


def test_a_rank_alone_is_no_process_of_several(monkeypatch, capsys):
    """Some clusters set RANK for every job."""
    monkeypatch.setenv("RANK", "1")
    assert run() == 0 and "epoch" in capsys.readouterr().out


def test_a_run_in_a_folder_of_pictures_is_refused(tmp_path, capsys):
    """Its own pictures would be a class. A run that is there already may go on."""
    save_pictures(tmp_path / "pets")
    os.symlink("pets", tmp_path / "link")
    flags = ["--dataset", "folder", "--data-dir", "pets"]
    before = tree()
    for out in ("pets/out", "link/a/b"):
        assert run(*flags, out=out) == 2
        assert f"--out {out} lies in --data-dir pets" in capsys.readouterr().err
    assert tree() == before
    assert run(*flags, "--max-minutes", 1e-9, out="pets2/out") == 0
    os.rename("pets2/out", "pets/out")
    assert run(*flags, "--resume", out="pets/out") == 0
    assert run("--data-dir", "pets", "--max-minutes", 1e-9, out="pets/shapes") == 0  # no pictures


def test_a_run_that_has_gone_on_while_another_was_reading_is_not_set_back(monkeypatch, capsys):
    """The second reads last.pt, then data and more; meanwhile the first ends and lets go."""
    flags = ["--epochs", 4, "--resume"]
    assert run(*flags, "--max-minutes", 1e-9) == 0
    real = train.prepare

    def wait(*args):
        late = real(*args)
        with monkeypatch.context() as patch:
            patch.setattr(train, "prepare", real)
            assert run(*flags) == 0
        return late

    monkeypatch.setattr(train, "prepare", wait)
    assert run(*flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "error: another run has gone on in out meanwhile: try again"
    assert saved()["epoch"] == 4 and len(read_csv()) == 4


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_runs(monkeypatch, capsys):
    """From its start, before anything is saved, to its end."""
    real, codes = train.train_epoch, []

    def train_epoch(*args):
        if not codes:
            codes.append(2)
            codes[0] = run("--seed", 1)
        return real(*args)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    assert run() == 0 and codes == [2]
    assert "another run is writing to out: choose another --out" in capsys.readouterr().err
    assert saved()["train"]["seed"] == 0
    assert run("--resume") == 0


def test_a_run_that_came_and_went_while_another_read_its_data_is_not_overwritten(
    monkeypatch, capsys
):
    real, codes = data.load, []

    def load(*args, **kwargs):
        if not codes:
            codes.append(None)
            codes[0] = run("--seed", 1)
        return real(*args, **kwargs)

    monkeypatch.setattr(data, "load", load)
    assert run() == 2 and codes == [0]
    assert "out already holds a run" in capsys.readouterr().err
    assert saved()["train"]["seed"] == 1


def test_a_run_in_a_thread_is_a_run(plain):
    """As Gradio and Streamlit start it; Python allows signal handlers in the main thread only."""
    codes, before = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: codes.append(run()))
    thread.start()
    thread.join()
    assert codes == [0] and signal.getsignal(signal.SIGINT) == before
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


# ---- 6 Resume ----


def full(*flags, out="out"):
    return run(*FULL, *flags, out=out)


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """Three epochs in one go, all switched on, each skips a step: last.pt, lines of the log."""
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, steps=(1,))
        assert full(out=out) == 0
    return contents(out / "last.pt"), (out / "log.csv").read_text().count("\n")


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """The same run, stopped twice: after epoch 1 and after epoch 2."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, steps=(1,))
        for resume in ([], ["--resume"]):
            assert full("--max-minutes", 1e-9, *resume, out=out) == 0
    return out


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """The folder of `plain` after its first of two epochs."""
    out = tmp_path_factory.mktemp("begun") / "out"
    assert run("--max-minutes", 1e-9, out=out) == 0
    return out


def test_training_stopped_and_resumed_equals_training_straight_through(straight, half, monkeypatch):
    """1 + 1 + 1 epochs against 3: every tensor, number and row of the log, to the bit."""
    expected, rows = straight
    assert contents(half / "last.pt")["/epoch"] == 2
    assert expected["/scaler/scale"] != 2.0**10 and expected["/scheduler/last_epoch"] == 12
    pieces = {"/ema/head.bias", "/optimizer/state/0/exp_avg", "/history/2/skipped_steps"}
    assert pieces | {"/best/model/head.bias"} <= set(expected)
    shutil.copytree(half, "out")
    poison(monkeypatch, steps=(1,))
    assert full("--resume") == 0
    assert difference(contents("out/last.pt"), expected) is None
    assert Path("out/log.csv").read_text().count("\n") == rows == 1 + 3


@pytest.mark.parametrize(
    "piece", ["model", "ema", "optimizer", "scheduler", "scaler", "history", "randomness"]
)
def test_leaving_any_piece_out_of_the_resume_is_noticed(piece, straight, half, monkeypatch):
    """The negative controls: with this piece as fresh as in a new run, the comparison must fail.

    (The best so far: test_best_of_an_earlier_sitting_survives.)
    """
    restore, epoch_seed = train.restore, augment.epoch_seed

    def forgetful(run, last):
        fresh = copy.deepcopy(run.state.state_dict()) | {"history": []}
        restore(run, {**last, piece: fresh.get(piece)})

    monkeypatch.setattr(train, "restore", forgetful)
    if piece == "randomness":  # the streams begin again with the first epoch's
        monkeypatch.setattr(augment, "epoch_seed", lambda seed, epoch: epoch_seed(seed, epoch - 2))
    shutil.copytree(half, "out")
    poison(monkeypatch, steps=(1,))
    assert full("--resume") == 0
    assert difference(contents("out/last.pt"), straight[0])


@pytest.mark.parametrize(
    "owner, name, numbers",
    [
        (optim, "train_step", (2, 6)),
        (os, "replace", (1, 2, 3, 4, 5, 7)),
        (evaluate, "evaluate", (1,)),
    ],
    ids=["step", "move", "evaluation"],
)
def test_a_run_that_dies_anywhere_and_is_resumed_ends_in_the_same_bits(
    owner, name, numbers, monkeypatch, plain
):
    """In a step, before a file is moved into its place, before the end."""
    for number in numbers:
        with monkeypatch.context() as patch:
            on_call(patch, owner, name, number, kill)
            with pytest.raises(Kill):
                run(out=number)
        assert run("--resume", out=number) == 0
        ours, theirs = contents(f"{number}/last.pt"), contents(plain / "last.pt")
        assert difference(ours, theirs) is None, number
        ours, theirs = (flat(saved(f"{out}/best.pt")) for out in (number, plain))
        assert difference(ours, theirs) is None, number
        assert [row["epoch"] for row in read_csv(f"{number}/log.csv")] == ["1", "2"]
        metrics = Path(f"{number}/metrics.json").read_bytes()
        assert metrics == (plain / "metrics.json").read_bytes()


def test_a_run_stopped_before_its_first_validation_resumes_to_the_same_bits():
    """There is no best epoch yet, and no best.pt."""
    flags = ("--eval-every", 3, "--epochs", 4)
    assert run(*flags, out="straight") == 0
    assert run(*flags, "--max-minutes", 1e-9) == 0
    assert not Path("out/best.pt").exists()
    assert run(*flags, "--resume") == 0
    assert difference(contents("out/last.pt"), contents("straight/last.pt")) is None


def test_best_of_an_earlier_sitting_survives(monkeypatch):
    """The best so far is carried on in last.pt; a worse epoch does not replace it."""
    kept = script(monkeypatch, [0.9, 0.8, 0.7])
    for flags in ([], ["--resume", "--save-every", 2], ["--resume", "--save-every", 1]):
        assert run("--epochs", 3, "--max-minutes", 1e-9, *flags) == 0
    best = saved("out/best.pt")
    assert (best["epoch"], best["accuracy"]) == (1, 0.9)
    assert difference(dict(best["model"]), kept[0]) is None
    assert [row["epoch"] for row in read_csv()] == ["1", "2", "3"]


def of_another_run(best):
    assert run("--seed", 1, out="other") == 0
    shutil.copy("other/best.pt", best)


def of_an_earlier_epoch(best):
    older = saved(best)
    older["epoch"], older["accuracy"] = 0, 0.01
    torch.save(older, best)


SPOILT = {
    "gone": Path.unlink,
    "empty": lambda best: best.write_bytes(b""),
    "half": lambda best: best.write_bytes(best.read_bytes()[:999]),
    "of another run": of_another_run,
    "of an earlier epoch": of_an_earlier_epoch,
}


@pytest.mark.parametrize("start", ["begun", "plain"])
@pytest.mark.parametrize("spoil", SPOILT)
def test_a_best_that_is_lost_is_derived_again_from_the_last(spoil, start, plain, begun):
    """last.pt is the whole truth: whatever best.pt holds blocks no resume and is put right, in the
    middle of a run and after its end."""
    shutil.copytree({"begun": begun, "plain": plain}[start], "out")
    Path("out/metrics.json").unlink(missing_ok=True)
    SPOILT[spoil](Path("out/best.pt"))
    assert run("--resume") == 0
    assert difference(flat(saved("out/best.pt")), flat(saved(plain / "best.pt"))) is None
    assert Path("out/metrics.json").read_bytes() == (plain / "metrics.json").read_bytes()


def test_best_is_what_last_says_of_the_best(plain):
    """With what it takes to use it, and nothing of training's state."""
    best, last = saved(plain / "best.pt"), saved(plain / "last.pt")
    for name in ("format", "train", "vit", "classes", "mean", "std", "fingerprint", "versions"):
        assert best[name] == last[name]
    assert difference(dict(best["model"]), dict(last["best"]["model"])) is None
    assert (best["epoch"], best["accuracy"]) == (last["best"]["epoch"], last["best"]["accuracy"])
    assert "optimizer" not in best


@pytest.mark.parametrize("first, then", [("float32", "float16"), ("float16", "float32")])
def test_a_run_may_move_to_a_device_of_another_dtype(first, then, monkeypatch):
    """Begun on an Ampere GPU, finished on a T4: the loss scale starts anew, the run goes on."""
    monkeypatch.setattr(optim, "pick_dtype", lambda *_: getattr(torch, first))
    assert run("--max-minutes", 1e-9) == 0
    monkeypatch.setattr(optim, "pick_dtype", lambda *_: getattr(torch, then))
    assert run("--resume") == 0
    assert bool(saved()["scaler"]) == (then == "float16")


def test_a_cpu_without_bfloat16_trains_in_float32_and_says_so(monkeypatch, capsys):
    """To the bits of a run in float32. `laptop` asks for bfloat16, and most laptops lack it."""
    assert run("--dtype", "float32", out="plainly") == 0
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert run("--dtype", "bfloat16") == 0
    assert "float32 in place of bfloat16" in capsys.readouterr().out
    assert difference(dict(saved()["model"]), dict(saved("plainly/last.pt")["model"])) is None


def test_resume_refuses_flags_that_contradict_the_saved_recipe(plain, capsys):
    """Each field in turn, by its flag; the run stays as it was."""
    shutil.copytree(plain, "out")
    before = tree()
    rescue = {"lr", "grad_clip", "dtype"}
    fixed = {k: v for k, v in OTHER.items() if k not in rescue}
    fixed |= {"dataset": "cifar10", "deterministic": True, "drop_path": 0.5}
    for name, value in fixed.items():
        words = flag(name, value)
        assert run("--resume", *words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"{words[0]} " in line and "contradicts the run to resume" in line, name
    assert tree() == before


@pytest.mark.parametrize(
    "words", ["--resume", " ".join([*TINY, "--resume"]), "--resume --batch-size 8"]
)
def test_resume_takes_the_recipe_from_the_run_and_needs_no_flags(words, begun, plain):
    """Nor does repeating them contradict it. (--batch-size alone scales a new run's rate.)"""
    shutil.copytree(begun, "out")
    assert main(*words.split()) == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


def test_a_flag_that_fits_the_run_need_not_fit_the_defaults():
    """One that only repeats the run: --dim 8 cannot have the three heads of the default."""
    own = "--batch-size 1 --mixup 0 --cutmix 0 --image-size 6 --patch-size 3".split()
    assert run(*own, "--max-minutes", 1e-9) == 0
    assert main(*"--resume --dim 8 --batch-size 1 --image-size 6".split()) == 0
    assert [row["epoch"] for row in read_csv()] == ["1", "2"]


def test_what_belongs_to_the_sitting_may_change_on_resume(begun, plain, monkeypatch):
    """Where the data lie, how often to save, on what to compute."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: seen.append("compiled") or call)
    monkeypatch.setattr(data, "load", lambda *args: seen.append(args[1]) or DATASET)
    shutil.copytree(begun, "out")
    changes = "--max-minutes 60 --save-every 2 --data-dir moved --device cpu --compile"
    assert run("--resume", *changes.split(), "--download-url", "u") == 0
    assert set(seen) == {"moved", "compiled"}
    ours, theirs = (contents(f"{out}/last.pt") for out in ("out", plain))
    changed = {k for k in ours if difference({k: ours[k]}, {k: theirs.get(k)})}
    assert changed == {f"/train/{k}" for k in ("save_every", "data_dir", "compile", "download_url")}


@pytest.mark.parametrize("dataset", ["shapes", "cifar10"])
def test_a_run_of_a_gpu_may_be_looked_at_on_a_machine_without_one(
    dataset, plain, begun, monkeypatch, capsys
):
    """A fresh one, or one of which an epoch is left, would take hours."""
    real = data.load
    monkeypatch.setattr(data, "load", lambda _, *rest: real("shapes", *rest))
    monkeypatch.setattr(ViTConfig, "flops_per_image", 10**15)
    for folder, out, code in ((plain, "complete", 0), (begun, "begun", 2)):
        shutil.copytree(folder, out)
        last = saved(f"{out}/last.pt")
        last["train"] |= {"device": "auto", "dataset": dataset}
        checkpoint.save_checkpoint(last, f"{out}/last.pt")
        assert main("--resume", "--out", out) == code
        told = "".join(capsys.readouterr())
        assert ("is complete" if code == 0 else "no accelerator found. 1 epochs of") in told


@pytest.mark.parametrize(
    "changed",
    [
        make_dataset(n=61),
        make_dataset(n=8),
        replace(DATASET, classes=["cat", "dog", "elk"]),
        make_dataset(("cat", "dog", "eel", "fox")),
        replace(DATASET, train_images=DATASET.train_images.flip(0)),
        replace(DATASET, train_labels=DATASET.train_labels.flip(0)),
    ],
    ids=["images", "too few", "names", "classes", "order", "labels"],
)
def test_resume_refuses_data_that_are_not_those_of_the_run(changed, begun, monkeypatch, capsys):
    """With other pictures, the split would leak validation images into training. Nor is a number
    that nobody typed called wrong, as where there are too few for the saved batch."""
    shutil.copytree(begun, "out")
    before = tree()
    monkeypatch.setattr(data, "load", lambda *_: changed)
    assert run("--resume") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the shapes that this machine draws are not those the run in out was trained on" in line
    assert tree() == before


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_resumed_run_keeps_the_normalisation_it_began_with(name, begun, plain, monkeypatch):
    """An ARM CPU may sum the same pixels to another last digit than an x86 CPU."""
    shutil.copytree(begun, "out")
    other = replace(DATASET, **{name: tuple(x + 1e-3 for x in getattr(DATASET, name))})
    monkeypatch.setattr(data, "load", lambda *_: other)
    assert run("--resume") == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda last: last.pop("scheduler"),
        lambda last: last.pop("history"),
        lambda last: last.update(optimizer={}),
        lambda last: last["optimizer"]["param_groups"].pop(),
        lambda last: last.update(best=3),
        lambda last: last["model"].pop("head.bias"),
        lambda last: last["best"].pop("model"),
        lambda last: last["train"].update(warmup=3),
        lambda last: last["train"].pop("lr"),
        lambda last: last["train"].update(lr=-1.0),
    ],
    ids="scheduler history optimizer group best weight best-weights later earlier lr".split(),
)
def test_a_last_that_holds_no_whole_run_is_refused_in_one_line(change, begun, capsys):
    """Of the right format, and written by other hands. It stays as it is."""
    shutil.copytree(begun, "out")
    last = saved()
    change(last)
    torch.save(last, "out/last.pt")
    before = tree()
    assert main("--resume") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "error: " in line and tree() == before


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
    if "last.pt" not in left:
        assert run("--resume") == 2 and tree() == before
        assert f"{left[0]} but no last.pt" in capsys.readouterr().err


def test_resume_into_a_folder_without_a_run_starts_one(plain):
    """So one command both starts and continues: a cell for Colab."""
    assert run("--resume") == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


# ---- 7 Saves ----


def test_rare_saves_lose_epochs_and_no_bits(monkeypatch):
    """--save-every 2 of 3 epochs: files after 2 and, being the last, 3."""
    flags = ("--save-every", 2, "--epochs", 3)
    assert run(*flags, out="straight") == 0
    for killed_in, holds in ((2, None), (3, 2)):
        out = f"killed in {killed_in}"
        with monkeypatch.context() as patch:
            on_call(patch, optim, "train_step", 5 * killed_in - 2, kill)
            with pytest.raises(Kill):
                run(*flags, out=out)
        assert Path(out, "last.pt").exists() == bool(holds)
        assert not holds or saved(f"{out}/last.pt")["epoch"] == holds
        assert run(*flags, "--resume", out=out) == 0
        assert difference(contents(f"{out}/last.pt"), contents("straight/last.pt")) is None


def test_what_the_screen_says_of_an_epoch_is_on_the_disk(monkeypatch):
    """A run that is killed after a line goes on after it."""
    on_disk, line = [], log.line
    spy = lambda *row: on_disk.append(saved()["epoch"]) or line(*row)  # noqa: E731
    monkeypatch.setattr(log, "line", spy)
    assert run("--epochs", 3) == 0 and on_disk == [1, 2, 3]


def test_on_a_gpu_ten_seconds_lie_between_two_saves_and_the_last_epoch_is_saved_all_the_same(
    monkeypatch,
):
    """Epochs of 4 seconds: after 1, 4, 7 and 8, the last. On a CPU every epoch is saved."""
    pauses = [train.save_pause(torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert pauses == [0, 10, 10]
    saves, save = [], train.save
    Clock(monkeypatch).takes("train_epoch", 4)
    monkeypatch.setattr(train, "save", lambda run: saves.append(run.epoch) or save(run))
    assert run("--epochs", 8, out="cpu") == 0 and saves == list(range(1, 9))
    saves.clear()
    monkeypatch.setattr(train, "save_pause", lambda device: 10)
    assert run("--epochs", 8, out="gpu") == 0 and saves == [1, 4, 7, 8]
    saves.clear()
    assert run("--epochs", 6, "--save-every", 2, out="both") == 0 and saves == [2, 6]
    assert difference(outcome("gpu/last.pt"), outcome("cpu/last.pt")) is None


def test_a_log_that_a_spreadsheet_holds_open_costs_a_warning(monkeypatch, capsys):
    """On Windows it cannot be replaced then. It is derived: the next save writes all of it."""
    held, replace_file = ["out/log.csv"] * 4, os.replace

    def refuse(source, target):
        if target in held:
            raise PermissionError(13, "Permission denied", source, None, held.pop())
        replace_file(source, target)

    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "replace", refuse)
    assert run() == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "'out/log.csv'" in line
    assert [row["epoch"] for row in read_csv()] == ["1", "2"]


def test_the_curves_are_drawn_at_saves_and_at_most_once_a_minute(monkeypatch):
    """So that a long run can be watched: epochs of 25 s, drawn after 1, 4 and 7."""
    clock, drawn = Clock(monkeypatch), []
    clock.takes("train_epoch", 25)
    monkeypatch.setattr(plots, "title_of", lambda *source: source)
    plot = lambda _, rows, title: drawn.append((len(rows), title))  # noqa: E731
    monkeypatch.setattr(plots, "plot_curves", plot)
    monkeypatch.setattr(train, "finish", lambda run: None)
    assert run("--epochs", 8) == 0
    assert drawn == [(n, ("shapes", "data")) for n in (1, 4, 7)]


def test_a_picture_that_fails_does_not_cost_the_run(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no fonts")

    for name in PLOTS:
        monkeypatch.setattr(plots, name, fail)
    assert run() == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") and "no fonts" in line for line in lines)
    assert {re.search(r"\w+\.png", line)[0] for line in lines} >= {"curves.png", "attention.png"}
    assert Path("out/metrics.json").exists()


def test_a_disk_that_is_really_full_ends_the_run_in_the_same_way(capsys):
    """The system refuses in the middle of a write, as `ulimit -f` makes it."""
    assert run("--max-minutes", 1e-9) == 0
    before = tree()
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["out/last.pt"]) // 2, hard))
    try:
        code = run("--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2 and "File too large" in line and "holds epoch 1 of 2" in line
    assert tree() == before
    assert main(*continuing(line)) == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
    ],
    ids=["gpu", "python"],
)
def test_out_of_memory_is_one_line_that_says_what_is_kept(error, monkeypatch, capsys):
    """In the eighth step, say, because another program has taken the GPU's memory."""

    def raise_it(*_):
        raise error

    with monkeypatch.context() as patch:
        on_call(patch, optim, "train_step", 8, raise_it)
        assert run() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory") and "--batch-size" in line
    assert "out/last.pt holds epoch 1 of 2" in line
    assert run("--resume") == 0


def test_any_other_failure_of_torch_keeps_its_traceback(monkeypatch):
    """A bug is not the user's to fix. But a GPU that fails loses no run either, and below the
    traceback stands how it goes on."""
    text = "CUDA error: an illegal memory access was encountered"

    def raise_it(*_):
        raise RuntimeError(text)

    on_call(monkeypatch, optim, "train_step", 8, raise_it)
    with pytest.raises(RuntimeError, match=text) as caught:
        run()
    [note] = caught.value.__notes__
    assert note.startswith("out/last.pt holds epoch 1 of 2; continue with: ")
    assert main(*continuing(note)) == 0


# ---- 8 Ending well ----


@pytest.mark.parametrize("minutes", [1, 0.9])
def test_max_minutes_ends_at_an_epoch_boundary_before_the_time_is_up(minutes, monkeypatch, capsys):
    """Epochs of 10 s by a false clock: a sixth, with a fifth to spare, would end at 62 s. A fifth
    one ends within 54 s, with that to spare."""
    Clock(monkeypatch).takes("train_epoch", 10)
    assert run("--epochs", 8, "--max-minutes", minutes, "--save-every", 100) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "out of time: out/last.pt holds epoch 5 of 8"
    assert [row["seconds"] for row in read_csv()] == ["10.0"] * 5
    assert main(*continuing(second), "--max-minutes", "60") == 0
    assert len(read_csv()) == 8


def test_the_epoch_in_which_the_blocks_are_compiled_is_not_expected_again(monkeypatch, capsys):
    """After 60 s and eleven times 10, another 12 would not fit into three minutes. (Another 72, and
    it were over after six epochs.)"""
    Clock(monkeypatch).takes("train_epoch", 60, *[10] * 19)
    assert run("--epochs", 20, "--max-minutes", 3, "--save-every", 100) == 0
    assert saved()["epoch"] == 12
    assert capsys.readouterr().out.splitlines()[-3].split()[-1] == "1:20"  # left: eight of 10


def test_under_a_time_limit_the_first_epoch_is_saved_to_know_how_long_a_save_takes(monkeypatch):
    """However rare saves are: the only one would come after five epochs of 10 s and end 15 s later,
    too late for Slurm."""
    clock = Clock(monkeypatch)
    clock.takes("train_epoch", 10)
    clock.takes("save", 15)
    assert run("--epochs", 8, "--max-minutes", 1, "--save-every", 100) == 0
    assert saved()["epoch"] == 2 and clock.now < 1060


def test_max_minutes_counts_the_saves_too(monkeypatch):
    """Epochs of 10 s and saves of 6 s by a false clock: three are done after 48 s, and a fourth
    would be after 64 s."""
    clock = Clock(monkeypatch)
    clock.takes("train_epoch", 10)
    clock.takes("save", 6)
    assert run("--epochs", 8, "--max-minutes", 1) == 0
    assert clock.now == 1000 + 48 and saved()["epoch"] == 3


def test_max_minutes_counts_the_validation_and_what_comes_before_the_first_epoch(monkeypatch):
    """18 s of decoding, and epochs of 10 + 5 s: after two of them, at 48 s, a third would not fit
    into the minute."""
    clock = Clock(monkeypatch)
    for name, seconds in (("prepare", 18), ("train_epoch", 10), ("validate_epoch", 5)):
        clock.takes(name, seconds)
    assert run("--epochs", 8, "--max-minutes", 1) == 0
    assert [row["seconds"] for row in read_csv()] == ["15.0"] * 2
    assert clock.now == 1000 + 18 + 2 * 15


def test_max_minutes_has_time_to_spare_for_the_first_validation(monkeypatch):
    """Of five epochs the last takes 11.5 s, after four of 10. After 51 s it would be cut off."""
    clock = Clock(monkeypatch)
    clock.takes("train_epoch", 10)
    clock.takes("validate_epoch", 1.5)
    assert run("--epochs", 8, "--eval-every", 5, "--max-minutes", 51 / 60) == 0
    assert clock.now == 1000 + 40


@pytest.mark.parametrize(
    "epochs, saves, minutes, done", [((10, 10, 30, 10), (0,), 1.5, 4), ((10,), (8, 1, 1), 1, 3)]
)
def test_max_minutes_expects_the_longest_epoch_and_the_longest_save_again(
    epochs, saves, minutes, done, monkeypatch
):
    """Some epochs are validated and others not, and a disk may be busy."""
    clock = Clock(monkeypatch)
    clock.takes("train_epoch", *epochs)
    clock.takes("save", *saves)
    assert run("--epochs", 8, "--max-minutes", minutes) == 0
    assert saved()["epoch"] == done


def test_a_run_whose_time_is_out_with_its_last_epoch_is_complete(capsys):
    """There is nothing to continue: it is evaluated."""
    assert run("--epochs", 1, "--max-minutes", 1e-9) == 0
    assert Path("out/metrics.json").exists() and "continue" not in capsys.readouterr().out


def test_the_time_left_is_the_mean_epoch_times_their_number(monkeypatch, capsys):
    """Of 10, 30, 20 and 40 s, but the first. The last epoch alone would make it jump."""
    Clock(monkeypatch).takes("train_epoch", 10, 30, 20, 40)
    assert run("--epochs", 4) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    left = [words[-1] for words in lines if words and words[0] in ("1", "2", "3", "4")]
    assert left == ["0:30", "1:00", "0:25", "0:00"]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_with_two_lines(number, code, monkeypatch, capsys, plain):
    """What is on the disk, and the command that continues; the old handlers are put back."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        on_call(patch, optim, "train_step", 8, lambda *_: signal.raise_signal(number))
        assert run("--seed", 0) == code
    assert signal.getsignal(number) == before
    out, err = capsys.readouterr()
    *_, first, second = out.splitlines()
    assert first == f"stopped by {number.name}: out/last.pt holds epoch 1 of 2" and not err
    assert main(*continuing(second)) == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None


def test_a_signal_before_the_first_save_says_so(monkeypatch, capsys):
    on_call(monkeypatch, optim, "train_step", 2, lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(out="my run") == 130
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "stopped by SIGINT: no epoch is saved in my run"
    assert "--out 'my run'" in second and continuing(second)[-1] == "--resume"


def test_a_signal_that_is_swallowed_does_not_make_the_run_unstoppable(monkeypatch):
    """As in a __del__, from which Python lets nothing escape."""
    clock, real = Clock(monkeypatch), optim.train_step
    swallowed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: swallowed.append(told.exc_type))

    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def step(*args):
        clock.now += 2
        Deaf()
        return real(*args)

    on_call(monkeypatch, optim, "train_step", 3, step)
    with monkeypatch.context() as patch:
        on_call(patch, optim, "train_step", 7, lambda *_: signal.raise_signal(signal.SIGINT))
        clock.takes("train_epoch", 2)
        assert run() == 130
    assert swallowed == [log.Stopped]


@pytest.mark.parametrize(
    "error, code",
    [
        (None, 130),
        (train.Diverged("epoch 2: the loss is nan"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (MemoryError(), 2),
        (RuntimeError("Connection closed by peer"), None),
    ],
)
def test_no_signal_interrupts_the_farewell(error, code, monkeypatch, capsys):
    """However late it comes, as torchrun's when another process has failed: what is on the disk is
    said, and the exit code is that of what came first."""

    def end(*_):
        if error is None:
            signal.raise_signal(signal.SIGINT)
        raise error

    on_call(monkeypatch, optim, "train_step", 8, end)
    clock, real = Clock(monkeypatch), checkpoint.saved_in

    def saved_in(out):
        clock.now += 5
        signal.raise_signal(signal.SIGTERM)
        return real(out)

    monkeypatch.setattr(checkpoint, "saved_in", saved_in)
    try:
        assert run() == code
        told = "".join(capsys.readouterr())
    except RuntimeError as caught:
        assert code is None
        [told] = caught.__notes__
    assert "out/last.pt holds epoch 1 of 2" in told
    assert "continue with: " in told or isinstance(error, MemoryError)


def test_two_lines_are_said_where_ctrl_c_has_ended_the_reader_too(monkeypatch, capsys):
    """As in `python train.py | tee log.txt`. A terminal still shows what comes on stderr."""
    reader, writer = os.pipe()

    def end(*_):
        os.close(reader)
        signal.raise_signal(signal.SIGINT)

    on_call(monkeypatch, optim, "train_step", 8, end)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert run() == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first == "stopped by SIGINT: out/last.pt holds epoch 1 of 2"
    assert main(*continuing(second)) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # between open, with
def test_a_signal_at_any_moment_of_a_save_leaves_whole_files_and_ends_it(monkeypatch):
    """At 40 random ones of a real save of some megabytes: torch.save would bury it, when it writes
    to a file from C++, under an error of its own, or abort the process."""
    monkeypatch.setattr(os, "fsync", FSYNC)
    ours, moments = prepare("--dim", 128, "--depth", 4), random.Random(0)
    train.save(ours)  # the first one imports Matplotlib
    began = time.perf_counter()
    train.save(ours)
    seconds = time.perf_counter() - began
    old = {n: signal.getsignal(n) for n in (*log.SIGNALS, signal.SIGALRM)}
    stopped = 0
    try:
        for _ in range(40):
            ours.written.clear()
            log.listen_to_signals()
            signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGINT))
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-4, seconds))
                train.save(ours)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except log.Stopped:
                stopped += 1
            checkpoint.load_checkpoint("out/last.pt")
            assert sorted(path.name for path in Path("out").iterdir()) == ["last.pt", "log.csv"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
    assert stopped >= 10


# ---- 9 The finish ----


def test_a_finished_run_is_not_evaluated_again(plain, capsys):
    """The test set is looked at once in the life of a run."""
    shutil.copytree(plain, "out")
    metrics = json.loads(Path("out/metrics.json").read_text())
    for left in (metrics, {k: v for k, v in metrics.items() if k != "data_dir"}):  # as once
        Path("out/metrics.json").write_text(json.dumps(left))
        before = tree()
        assert run("--resume") == 0
        assert "complete" in capsys.readouterr().out and tree() == before


@pytest.mark.parametrize("left", ["another epoch's", "torn", "empty", "a list"])
def test_metrics_count_as_the_end_only_if_they_are_whole_and_of_the_best_epoch(left, plain):
    shutil.copytree(plain, "out")
    final = Path("out/metrics.json").read_text()
    other = json.dumps({**json.loads(final), "epoch": 99})
    texts = {"torn": final[:40], "empty": "", "a list": "[]"}
    Path("out/metrics.json").write_text(texts.get(left, other))
    assert run("--resume") == 0
    assert Path("out/metrics.json").read_text() == final


def test_the_accuracy_that_is_said_at_the_end_is_that_which_chose(monkeypatch, capsys):
    """The average's, where the run keeps one."""
    validate = lambda run, model, part: (1.0, 0.75 if model is run.state.ema else 0.25)  # noqa: E731
    for ema, told in ((0, "25.00%"), (0.9, "75.00%")):
        with monkeypatch.context() as patch:
            patch.setattr(train, "validate", validate)
            assert run("--ema-decay", ema, out=ema) == 0
        assert f"best epoch 1, validation accuracy {told};" in capsys.readouterr().out


def test_the_same_pictures_by_another_path_are_not_looked_at_again(plain, capsys):
    shutil.copytree(plain, "out")
    os.mkdir("data")
    os.symlink("data", "link")
    for way in ("./data", os.path.abspath("data"), "other/../data/", "link"):
        assert run("--resume", "--data-dir", way) == 0
        assert "complete" in capsys.readouterr().out, way


def test_other_pictures_that_were_looked_at_do_not_replace_the_test_set(plain, capsys):
    """By `evaluate.py out --data-dir elsewhere`, before the run's own evaluation."""
    shutil.copytree(plain, "out")
    final = Path("out/metrics.json").read_text()
    os.remove("out/metrics.json")
    shutil.copytree("out", "elsewhere")
    assert evaluate.main(["out", "--device", "cpu", "--data-dir", "elsewhere"]) == 0
    assert Path("out/metrics.json").read_text() != final
    assert run("--resume") == 0 and "now, once, the test set" in capsys.readouterr().out
    assert Path("out/metrics.json").read_text() == final


def test_looking_at_the_test_set_on_the_way_does_not_replace_the_last_look(monkeypatch, capsys):
    """Even if the epoch that was looked at stays the best: its curves ended there."""
    script(monkeypatch, [0.9, 0.8])
    assert run("--max-minutes", 1e-9) == 0
    assert evaluate.main(["out", "--device", "cpu"]) == 0
    for told in ("now, once, the test set", "complete, and so is its evaluation"):
        capsys.readouterr()
        assert run("--resume") == 0
        assert told in capsys.readouterr().out


def test_a_kill_among_the_pictures_does_not_lead_to_a_second_look(monkeypatch, capsys, plain):
    """The numbers were said, then written, before the first picture."""
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(plots, "plot_confusion_matrix", kill)
        run()
    out = capsys.readouterr().out
    assert "accuracy" in out.partition("now, once, the test set")[2]
    assert Path("out/metrics.json").read_bytes() == (plain / "metrics.json").read_bytes()
    assert run("--resume") == 0
    assert "complete" in capsys.readouterr().out


def test_the_best_is_what_is_evaluated_with_all_the_curves(monkeypatch):
    seen = []
    spy = lambda best, out, **options: seen.append((best, options))  # noqa: E731
    monkeypatch.setattr(evaluate, "evaluate", spy)
    kept = script(monkeypatch, [0.2, 0.9, 0.1])
    assert run("--epochs", 3) == 0
    [(best, options)] = seen
    assert best["epoch"] == 2 and difference(dict(best["model"]), kept[1]) is None
    assert len(options["history"]) == 3


def test_the_last_line_shows_how_to_use_the_result(capsys):
    """A command that works: quoted, and callable from here."""
    assert run(out="my run") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last.partition("try python ")[2])
    assert os.path.samefile(words[0], HERE / "evaluate.py") and words[-1] == "PICTURE"
    Image.new("RGB", (8, 8)).save("a.png")
    assert evaluate.main([*words[1:-1], "a.png"]) == 0


class Sealed:
    """The test split, behind a seal: to know how many images there are is all that is allowed."""

    def __len__(self):
        return 30

    def __getattr__(self, name):
        raise AssertionError(f"the test split was touched: {name}")

    __getitem__ = __iter__ = lambda self, *_: self.touched


def test_training_never_reads_the_test_split(monkeypatch, plain):
    """Until finish(): no choice is made on it."""
    sealed = replace(DATASET, test_images=Sealed(), test_labels=Sealed())
    monkeypatch.setattr(data, "load", lambda *_: sealed)
    real = train.finish

    def finish(run):
        run.dataset = DATASET
        real(run)

    monkeypatch.setattr(train, "finish", finish)
    assert run() == 0
    assert difference(contents("out/last.pt"), contents(plain / "last.pt")) is None
    with pytest.raises(AssertionError, match="touched"):
        Sealed()[0]


# ---- 10 Bad input ----


def pictures(*classes, test=None):
    for part, names in (("train", classes), ("test", test or classes)):
        for name in names:
            os.makedirs(f"pics/{part}/{name}")
            for i in range(3):
                Image.new("RGB", (8, 8), (40 * i,) * 3).save(f"pics/{part}/{name}/{i}.png")


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
    path = Path("pics/train/dog/1.png")
    path.write_bytes(path.read_bytes()[:40])


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
    "--lr 0": "lr must be positive and finite, got 0",
    "--lr -0.1": "lr must be positive and finite, got -0.1",
    "--lr nan": "lr must be positive and finite, got nan",
    "--lr inf": "lr must be positive and finite, got inf",
    "--max-minutes 0": "max_minutes must be positive",
    "--max-minutes nan": "max_minutes must be positive",
    "--weight-decay -1": "weight_decay must be at least 0",
    "--weight-decay inf": "weight_decay must be at least 0",
    "--grad-clip -1": "grad_clip must be at least 0",
    "--mixup -1": "mixup must be at least 0",
    "--cutmix inf": "cutmix must be at least 0",
    "--randaugment-ops -1": "randaugment_ops must be at least 0",
    "--randaugment-magnitude 31": "randaugment_magnitude must be between 0 and 30, got 31",
    "--randaugment-prob 1.5": "randaugment_prob must be between 0 and 1",
    "--mix-until 1.1": "mix_until must be between 0 and 1",
    "--mix-prob nan": "mix_prob must be between 0 and 1",
    "--pct-start 1": "pct_start must be at least 0 and below 1, got 1.0",
    "--label-smoothing 1": "label_smoothing must be at least 0 and below 1, got 1.0",
    "--ema-decay 1": "ema_decay must be at least 0 and below 1, got 1.0",
    "--seed -1": "seed must be at least 0 and below 2^32, got -1",
    "--seed 4294967296": "seed must be at least 0 and below 2^32",  # torch takes it for seed 0
    "--crop centre": 'crop must be pad, resized or none, got "centre"',
    "--randaugment-fill red": 'randaugment_fill must be black or mean, got "red"',
    "--dtype int8": "dtype must be auto, float32, bfloat16 or float16",
    "--dataset mnist": "dataset must be cifar10, cifar100, folder or shapes",
    "--preset huge": "invalid choice: 'huge'",
    "--device gpu": 'unknown device "gpu"',
    "--device cuda": 'device "cuda" is not available here',
    "--device mps": 'device "mps" is not available here',
    "--image-size 10": "image_size 10 is not divisible by patch_size 4",
    "--dim 9": "dim 9 is not divisible by heads 2",
    "--depth 0": "depth must be at least 1, got 0",
    "--dim -8": "dim must be at least 1",
    "--patch-size 0": "patch_size must be at least 1",
    "--heads 0": "heads must be at least 1",
    "--mlp-ratio 0": "mlp_ratio 0.0 times dim 8",
    "--image-size 4000000": "out of memory",
    "--image-size 4000000000": "out of memory",  # torch: Storage size calculation overflowed
    "--mlp-ratio 1e18": "mlp_ratio 1e+18 times dim 8 is no width for a hidden layer",
    "--dim 99999999999999999998": "--dim: too large",
    "--dropout 1": "dropout must be in [0, 1)",
    "--drop-path nan": "drop_path must be in [0, 1)",
    "--pool max": 'pool must be "cls" or "mean", got "max"',
    "--in-channels 3": "unrecognized arguments: --in-channels 3",
    "--num-classes 3": "unrecognized arguments: --num-classes 3",
    "--dataset cifar10": "cifar10 has images of 32x32 pixels, image_size is 8",
    "--batch-size 1": "batch_size 1 leaves nothing to mix with",
    "--batch-size 1 --mixup 0": "batch_size 1 leaves nothing to mix with",
    "--batch-size 1 --cutmix 0": "batch_size 1 leaves nothing to mix with",
    "--batch-size 41": "batch_size 41 is more than the 40 training images",
    "--val-size 60": "val_size must be between 1 and",
    "--layers 3": "unrecognized arguments: --layers 3",
    "--epoch 3": "unrecognized arguments: --epoch 3",
    "--resume yes": "unrecognized arguments: yes",
    "train.pt": "unrecognized arguments: train.pt",
    "--epochs three": "argument --epochs: invalid int value: 'three'",
    "--batch-size 8.5": "argument --batch-size: invalid int value: '8.5'",
    "--lr fast": "argument --lr: invalid float value: 'fast'",
    "--epochs": "argument --epochs: expected one argument",
    FOLDER: (no_such_folder, "pics"),
    FOLDER + "--val-size 1": (an_empty_class, "eel"),
    FOLDER + "--val-size 2": (other_classes_in_test, "eel"),
    FOLDER + "--val-size 3": (a_corrupt_picture, "pics/train/dog/1.png"),
    "--seed 0": (a_file_in_the_way, "cannot write to the output folder out"),
    "--out file/below/it": (a_file_above, "file is not a folder"),
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_two(flags, monkeypatch, capsys):
    """On stderr, without a traceback; nothing is written or changed, but that decoded pictures are
    kept for the next try."""
    pretend(monkeypatch, None)
    prepare_it, message = no_such_folder, BAD_INPUT[flags]
    if isinstance(message, tuple):
        prepare_it, message = message
    prepare_it()
    before = tree()
    assert run(*flags.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "error: " in line and message in line
    assert {name: x for name, x in tree().items() if ".cache-" not in name} == before


def test_two_spaces_in_a_path_stay_two(capsys):
    """A path or a command that is not what it was leads elsewhere."""
    assert run(out="my  run") == 0 and run(out="my  run") == 2
    assert "error: my  run already holds a run" in capsys.readouterr().err


def test_an_error_of_many_lines_is_one_line(monkeypatch, capsys):
    def load(*_):
        raise OSError("two\n  lines")

    monkeypatch.setattr(data, "load", load)
    assert run() == 2
    assert capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize("name", ["prepare", "train"])
def test_a_reader_that_has_had_enough_ends_the_run_without_a_word(name, monkeypatch, capsys):
    """As in `| head`: log.run_program knows what to do."""

    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(train, name, broken)
    with pytest.raises(BrokenPipeError):
        main(*TINY, "--out", "out")
    assert not capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_epoch(monkeypatch, capsys):
    """Not after it, when it is lost. (The tests may run as root, who can write anywhere.)"""
    os.makedirs("out")
    tried = mock.Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(os, "open", tried)
    assert run() == 2 and tried.call_count == 1  # on Windows, tempfile would try for ever
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot write to the output folder out" in line and tree() == {"out": None}


# the second is found when the processes have joined
@pytest.mark.parametrize(
    "flags, text",
    [
        (["--epochs", 0], "epochs must be at least 1, got 0"),
        (["--batch-size", 9], "batch_size 9 is not divisible by the 2 processes"),
    ],
)
def test_of_several_processes_one_says_what_is_wrong(flags, text, joined, monkeypatch, capsys):
    """The others wait: when one leaves, torchrun ends the first too, which may still import. Where
    nobody ends them, as on a second machine that alone lacks something, they say it as well."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("0", "error: "), ("1", "error: rank 1: ")):
        monkeypatch.setenv("RANK", rank)
        assert run(*flags) == 2
        assert capsys.readouterr().err == f"{told}{text}\n" and not tree()
    assert len(waited) == 1 and waited[0] >= 5
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    assert run(*flags) == 143 and not "".join(capsys.readouterr())


@pytest.mark.parametrize("error", [OSError("its disk is full"), MemoryError()])
def test_of_several_processes_the_one_that_fails_alone_says_so(error, monkeypatch, capsys):
    """The others only see that it is gone."""

    def fail(*_):
        raise error

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(train, "prepare", lambda *_: SimpleNamespace(epoch=1))
    monkeypatch.setenv("RANK", "1")
    os.makedirs("out")
    for world, told in (("2", "error: rank 1: "), ("1", "error: ")):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert run() == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(told) and "rank" not in line.removeprefix(told)


@pytest.mark.parametrize(
    "call, rank, told, kept",
    [
        ("barrier", 0, "error: another", False),
        ("barrier", 1, "error: rank 1: another", False),
        ("all_reduce", 0, "error: rank 0: another", True),  # of the gradients
        ("all_reduce", 1, "error: rank 1: another", True),  # of an epoch's losses
    ],
)
def test_a_process_that_the_others_have_left_waits_and_says_so(
    call, rank, told, kept, joined, monkeypatch, capsys
):
    """Where nobody ends it, either: before the first step, and in the middle of an epoch."""
    waited = []
    gone = RuntimeError("Connection closed\nby peer")
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(train.dist, call, mock.Mock(side_effect=gone))
    monkeypatch.setattr(train.dist, "is_initialized", lambda: kept and rank == 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert run() == 2 and waited and min(waited) >= 5
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{told} process of this run has ended")
    assert "(Connection closed by peer)" in line
    assert ("no epoch is saved in out; continue with: torchrun" in line) == kept


def test_of_several_processes_one_says_what_the_data_are(joined, monkeypatch, capsys):
    """What pictures.py prints, every process would."""

    def load(*args, real=data.load):
        print("set aside for the test")
        return real(*args)

    monkeypatch.setattr(data, "load", load)
    for rank in (0, 1):
        prepare(rank=rank, world=2)
        assert ("set aside for the test" in capsys.readouterr().out) == (rank == 0)


# ---- 11 Real processes ----

STARTED = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while STARTED:
        STARTED[-1].terminate()
        STARTED.pop().communicate(timeout=60)


def start(program, *words):
    """A process in the test's folder, with one thread; its stdout and stderr are pipes."""
    command = [sys.executable, "-u"]
    command += [str(HERE / program)] if program.endswith(".py") else ["-m", program]
    command += map(str, words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen(command, env=ALONE, start_new_session=True, **pipes))
    return STARTED[-1]


@contextlib.contextmanager
def forked(*flags, **environment):
    """A process that trains with these flags, and its output. It saves a new Python's seconds of
    imports; killed, it ends as any other does."""
    reader, writer = os.pipe()

    def child():
        os.environ.update(environment)
        sys.stdout = sys.stderr = os.fdopen(writer, "w", buffering=1)
        sys.exit(main(*flags))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writer)
    with os.fdopen(reader) as output:
        try:
            yield process, output
        finally:
            process.kill()
            process.join()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_that_is_killed_in_the_middle_of_a_bar_stops_nobody_else():
    """Support code is tested too."""

    def die():
        train.tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    locks = train.tqdm.get_lock().locks
    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    for lock in locks:
        assert lock.acquire(timeout=5)
        lock.release()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """DATASET as a folder of PNGs, decoded and cached; the flags of a run on it."""
    root = tmp_path_factory.mktemp("folder")
    save_pictures(root)
    data.load("folder", str(root), 8)
    return [*TINY, "--dataset", "folder", "--data-dir", str(root)]


def wait_for(output, start):
    """Read up to a line that starts like this."""
    for line in output:
        if line.strip().startswith(start):
            return
    raise AssertionError(f"the output ends without {start!r}")


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_real_process_with_two_lines_and_its_exit_code(number, code, folder):
    """No traceback, and a command that works. (SIGTERM goes to the whole group.)"""
    process = start("train.py", *folder, "--epochs", "100000", "--out", "my run")
    wait_for(process.stdout, "2 ")
    os.killpg(process.pid, number) if number == signal.SIGTERM else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    *_, first, second = out.splitlines()
    assert process.returncode == code and not err
    told = rf"stopped by {number.name}: my run/last.pt holds epoch (\d+) of 100000"
    epoch = int(re.fullmatch(told, first)[1])  # log.csv may be one row behind it, until then
    assert main(*continuing(second), "--max-minutes", "1e-9") == 0
    assert len(read_csv("my run/log.csv")) == epoch + 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: where threads are
def test_a_terminal_that_closes_ends_the_run_and_loses_nothing(folder):
    """As when ssh breaks off. Its two lines find no reader, and no traceback comes instead."""
    child, terminal = pty.fork()
    if child == 0:
        code = None
        try:
            sys.stdout = open(1, "w", buffering=1, closefd=False)
            code = main(*folder, "--epochs", 100_000, "--save-every", 2)
        finally:
            os._exit(99 if code is None else code)
    with open(terminal) as output:
        wait_for(output, "3 ")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    done = saved()["epoch"]
    assert main(*folder, "--epochs", 100_000, "--resume", "--max-minutes", "1e-9") == 0
    assert saved()["epoch"] > done


def torture(folder, kills, epochs, seed):
    """Kill -9 a run at random moments; its files must always be whole."""
    moments = random.Random(seed)
    flags = [*folder, *FULL, "--epochs", epochs, "--dtype", "float32"]  # float16 crawls on a CPU
    assert main(*flags, "--out", "straight") == 0
    for _ in range(kills):
        with forked(*flags, "--out", "out", "--resume") as (process, output):
            wait_for(output, "epoch")
            for _ in range(moments.randrange(epochs // kills)):
                next(output)
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        for name in ("last.pt", "best.pt"):
            if os.path.exists(f"out/{name}"):
                checkpoint.load_checkpoint(f"out/{name}")
        if os.path.exists("out/log.csv"):
            rows = read_csv()
            assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(rows))]
            assert all(None not in row.values() and float(row["seconds"]) for row in rows)
    assert main(*flags, "--out", "out", "--resume") == 0
    assert difference(contents("out/last.pt"), contents("straight/last.pt")) is None
    bests = [flat(saved(f"{out}/best.pt")["model"]) for out in ("out", "straight")]
    assert difference(*bests) is None and len(read_csv()) == epochs


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: where threads are
def test_two_kills_lose_nothing(folder):
    """SIGKILL cannot be caught: only files that are always whole help."""
    torture(folder, kills=2, epochs=8, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_twenty_kills_lose_nothing(folder):
    torture(folder, kills=20, epochs=60, seed=1)


def assert_like_one_process(out):
    """The same log and weights as the run in one/, but for float32's rounding."""
    for row, expected in zip(read_csv(f"{out}/log.csv"), read_csv("one/log.csv"), strict=True):
        for name in set(row) - set(WALL_CLOCK) - {"ema_accuracy"}:
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4), name
    ours, theirs = (saved(f"{folder}/last.pt")["model"] for folder in (out, "one"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert Path(out, "metrics.json").exists()


@contextlib.contextmanager
def launched(world, *flags):
    """What torchrun starts: of each rank the process and its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(forked(*flags, **shared, RANK=str(i), LOCAL_RANK=str(i)))
            for i in range(world)
        ]


@contextlib.contextmanager
def processes(world, *flags):
    """Ranks that all end well; gives the first one's output. The others say nothing."""
    with launched(world, *flags) as started:
        yield started[0][1]
        for i, (process, output) in enumerate(started):
            process.join(60)
            assert process.exitcode == 0 and (i == 0 or output.read() == "")


def test_the_first_process_decides_whether_the_time_is_up(monkeypatch):
    """Whatever the own clock says: one would stop, and wait for another that goes on."""
    monkeypatch.setattr(machine, "rank_0_decides", lambda over, *_: not over)
    assert run("--max-minutes", 60) == 0 and saved()["epoch"] == 1


def test_a_process_whose_neighbours_have_left_at_the_end_ends_well(monkeypatch):
    """All is written by then."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    for name in ("prepare", "train"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(train.dist, "barrier", mock.Mock(side_effect=RuntimeError))
    assert run() == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_train_like_one(folder):
    """Same batches, same schedule, gradients averaged. And what two have begun, here copied when
    they had just saved their first epoch, one can finish."""
    flags = [*folder, "--epochs", "5", "--lr", "1e-3"]
    with processes(2, *flags, "--out", "two") as output:
        wait_for(output, "1 ")
        os.makedirs("begun")
        shutil.copy("two/last.pt", "begun")
        rest = output.read()
    assert rest.count("wrote metrics.json") == 1  # rank 0 alone evaluates and prints
    assert main(*flags, "--out", "one") == 0
    assert main(*flags, "--out", "begun", "--resume") == 0
    for out in ("two", "begun"):
        assert_like_one_process(out)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_three_processes_stopped_and_resumed_equal_three_that_went_straight_through(folder):
    """To the bit. From three on, the order in which gradients are added is in the last one."""
    flags = [*folder, "--epochs", "2", "--batch-size", "9", "--lr", "0.01"]
    for more in (["straight"], ["parts", "--max-minutes", "1e-9"], ["parts", "--resume"]):
        with processes(3, *flags, "--out", *more):
            pass
    assert difference(contents("parts/last.pt"), contents("straight/last.pt")) is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_the_first_process_alone_can_know_it_says_alone():
    """It reads the data for all. The others find that it has left, and wait in silence for torchrun
    (here this test) to end them: it was a traceback about a closed connection."""
    flags = ["--dataset", "folder", "--data-dir", "nosuch", "--device", "cpu", "--out", "out"]
    with launched(2, *flags) as [(first, told), (second, silence)]:
        first.join(60)
        time.sleep(0.3)
        second.terminate()
        second.join(60)
        assert (first.exitcode, second.exitcode) == (2, 143)
        *_, line = told.read().splitlines()
        assert line.startswith("error: no folder nosuch: ") and silence.read() == ""


def torchrun(*flags):
    launch = ("--standalone", "--nproc_per_node=2", HERE / "train.py")
    return start("torch.distributed.run", *launch, *flags)


@pytest.mark.slow
def test_two_processes_are_out_of_time_together(folder):
    """Rank 0's clock decides, and the command that continues is torchrun's."""
    flags = [*folder, "--epochs", "5", "--lr", "1e-3"]
    process = torchrun(*flags, "--out", "two", "--max-minutes", "1e-9")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    [told] = re.findall(r"continue with: torchrun --nproc_per_node=2 (\S+)", out)
    assert os.path.samefile(told, train.__file__) and len(read_csv("two/log.csv")) == 1
    assert main(*flags, "--out", "one") == 0
    assert torchrun(*flags, "--out", "two", "--resume").wait(120) == 0
    assert_like_one_process("two")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
@pytest.mark.parametrize("victim", [0, -1])
def test_a_killed_rank_ends_the_job_and_one_process_goes_on(victim, folder):
    """torchrun ends the other one; what was saved is whole."""
    flags = [*folder, "--out", "out", "--epochs", "100000"]
    process = torchrun(*flags)
    wait_for(process.stdout, "2 ")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[victim]), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None) and "train.py" in err
    epochs = saved()["epoch"]
    assert main(*flags, "--resume", "--max-minutes", "1e-9") == 0
    assert len(read_csv()) == epochs + 1


@pytest.mark.slow
def test_bad_input_to_the_real_program_is_one_line_that_comes_quickly():
    """Without torchvision, Pillow and Matplotlib, which take longer to import than all the rest."""
    code = """import runpy, sys
sys.argv = [sys.argv[1], "--epochs", "0"]
try: runpy.run_path(sys.argv[0], run_name="__main__")
finally: print(sorted({"torchvision", "PIL", "matplotlib"} & set(sys.modules)))"""
    command = [sys.executable, "-c", code, str(HERE / "train.py")]
    process = subprocess.run(command, env=ALONE, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "[]\n" and not tree()
    assert process.stderr == "error: epochs must be at least 1, got 0\n"


# ---- 12 A GPU that is not there ----

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
READS = ("item", "tolist", "nonzero", "equal", "__bool__", "__int__", "__float__")


class PretendedGPU(TorchFunctionMode):
    """Tensors that are moved to cuda stay on the CPU, but say they are there, and keep apart.

    As on a real one, a call with tensors of both kinds is refused, unless one is a single number.
    `waits` lists the calls for which the CPU would wait for the GPU: what reads from it, and what
    copies to it (from ordinary memory). `asked` lists the devices whose autocast and loss scale
    the program wanted.
    """

    waits, asked = (), ()

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
        if (source != goal and copies) or (source and name in READS):
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

    pretended = PretendedGPU()
    monkeypatch.setattr(torch.version, "hip", None)  # of PyTorch for AMD

    def on_cpu(real):
        def answer(device, *args, **kwargs):
            pretended.asked += (device,)
            return real("cpu", *args, **kwargs)

        return answer

    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group)
    monkeypatch.setattr(torch, "autocast", on_cpu(torch.autocast))
    monkeypatch.setattr(torch.amp, "GradScaler", on_cpu(torch.amp.GradScaler))
    for room in (machine, evaluate):
        monkeypatch.setattr(room, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "can_compile", lambda device: False)
    monkeypatch.setattr(train, "save_pause", lambda device: 0.0)
    return pretended


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
    [
        pytest.param("--dtype bfloat16", marks=pytest.mark.slow),
        pytest.param("--dtype bfloat16 --preset strong --crop resized", marks=pytest.mark.slow),
        " ".join(FULL),
    ],
    ids=["deit", "strong", "float16"],
)
def test_a_run_on_a_gpu_mixes_no_devices_and_resumes_to_the_bits_of_a_cpu(gpu, flags, monkeypatch):
    """What a GPU's own kernels round is another matter; every step here is the CPU's."""
    flags = [*flags.split(), "--epochs", 2]
    with monkeypatch.context() as patch:
        patch.setattr(MultiHeadAttention, "fused", True)  # as it is on a GPU by itself
        assert run(*flags, out="cpu") == 0
    gpu.asked = ()
    with gpu:
        assert run(*flags, "--device", "cuda") == 0
        assert run(*flags, "--device", "cuda", "--max-minutes", 1e-6, out="stopped") == 0
        assert run(*flags, "--device", "cuda", "--resume", out="stopped") == 0
        for name in ("plot_attention", "plot_positions"):
            monkeypatch.setattr(plots, name, PLOTS[name])
        seen = len(gpu.waits)
        assert evaluate.main(["out/best.pt", "--split", "val", "--device", "cuda"]) == 0
        assert len(gpu.waits) > seen  # it was there
        assert Path("out/attention_val.png").exists() and Path("out/positions.png").exists()
    assert set(gpu.asked) == {"cuda"}  # of another, all would go on in float32
    assert difference(outcome("out/last.pt"), outcome("cpu/last.pt")) is None
    assert difference(outcome("stopped/last.pt"), outcome("cpu/last.pt")) is None


def test_what_is_measured_and_named_is_the_device_of_the_run_in_its_dtype(gpu, monkeypatch):
    """Else the 100 % of MFU, and the machine to which numbers are traced, were another's."""
    seen, facts = [], machine.versions
    monkeypatch.setattr(machine, "measure_peak", lambda *args: seen.append(args) or 1e12)
    monkeypatch.setattr(machine, "versions", lambda *args: seen.append(args) or facts())
    with gpu:
        prepare("--device", "cuda", "--dtype", "bfloat16")
    assert seen == [(CUDA, torch.bfloat16), (CUDA,)]


def test_a_decision_is_sent_from_gpu_to_gpu(gpu, monkeypatch):
    """NCCL takes no tensor of a CPU."""
    sent = []
    monkeypatch.setattr(machine.dist, "broadcast", lambda x, src: sent.append(x.device))
    with gpu:
        assert machine.rank_0_decides(True, 2, CUDA) and sent == [CUDA]


def test_nothing_is_sorted_on_the_device(gpu, monkeypatch):
    """On MPS, before torch 2.13, argsort was wrong beyond 256 numbers (pytorch/pytorch#155560), and
    RandAugment passed over most images without a word."""
    real, seen = torch.Tensor.argsort, set()
    monkeypatch.setattr(
        torch.Tensor, "argsort", lambda x, **more: seen.add(x.device.type) or real(x, **more)
    )
    with gpu:
        assert run("--device", "cuda", "--dtype", "float32") == 0
    assert seen == {"cpu"}


def test_each_process_takes_the_gpu_of_its_number(gpu, joined, monkeypatch):
    """Its own, before NCCL starts; else all of them would sit on the first."""
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(train.dist, "init_process_group", lambda name, **_: calls.append(name))
    with gpu:
        ours = prepare("--device", "cuda", "--dtype", "bfloat16", rank=1, world=2)
    assert calls == [torch.device("cuda", 1), "nccl"] and ours.device == calls[0]


def test_more_processes_than_gpus_are_refused(gpu, joined, monkeypatch):
    """By all of them, so that the first can say so. Only those of this machine count."""
    late = lambda *_, **__: pytest.fail("too late")  # noqa: E731
    for rank in (0, 2):
        with monkeypatch.context() as patch, gpu:
            patch.setattr(train.dist, "init_process_group", late)
            with pytest.raises(ValueError, match="3 processes need as many GPUs, and here are 2"):
                prepare("--device", "cuda", rank=rank, world=3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with gpu, pytest.raises(ValueError, match="LOCAL_RANK is not set"):
        prepare("--device", "cuda", rank=3, world=4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    flags = ("--device", "cuda", "--batch-size", 20, "--dtype", "bfloat16")
    with gpu:
        assert prepare(*flags, rank=3, world=4).device == torch.device("cuda", 1)


def test_an_epoch_on_a_gpu_waits_no_oftener_for_more_steps(gpu):
    """Only float16 does, once a step: whether it overflowed has to be asked."""
    for dtype, grows in (("bfloat16", False), ("float16", True)):
        waits = []
        for batch in (8, 20):  # 5 steps, 2 steps
            seen = len(gpu.waits)
            flags = ("--dtype", dtype, "--epochs", 1, "--grad-clip", 1, "--ema-decay", 0.9)
            with gpu:
                name = f"{dtype}-{batch}"
                assert run(*flags, "--device", "cuda", "--batch-size", batch, out=name) == 0
            waits.append(len(gpu.waits) - seen)
        assert (waits[0] > waits[1]) == grows and waits[1] > 0


# ---- 13 The files ----

# What a room may import of the others: arrows point down only. All know torch.
BELOW = {
    "vit": "",
    "pictures": "",
    "data": "pictures",
    "augment": "data",
    "machine": "",
    "muon": "machine",
    "recipe": "vit",
    "optim": "vit machine muon recipe",
    "checkpoint": "vit machine",
    "log": "checkpoint",
    "plots": "vit data",
    "evaluate": "vit pictures data machine checkpoint log plots",
    "train": "vit pictures data augment machine muon recipe optim checkpoint log plots evaluate",
    "bench": "vit pictures data augment machine muon recipe optim checkpoint log evaluate train",
}
OUTSIDE = {
    "pictures": "numpy PIL tqdm",
    "data": "torchvision",
    "augment": "numpy torchvision matplotlib PIL",
    "log": "tqdm",
    "plots": "matplotlib",
    "train": "tqdm",
    "bench": "torchvision PIL timm vit_pytorch",
}
SLOW = {"torchvision", "PIL", "matplotlib", "timm", "vit_pytorch"}


def imports(nodes):
    """The top-level names of all modules that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


def parsed(room):
    return ast.parse((HERE / f"{room}.py").read_text())


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_what_the_map_allows(room):
    """Pixels know no model, the model no pixels, and the reader of a result not the loop."""
    allowed = {"torch", *BELOW[room].split(), *OUTSIDE.get(room, "").split()}
    assert imports(ast.walk(parsed(room))) <= allowed


@pytest.mark.parametrize("room", BELOW)
def test_importing_a_room_runs_nothing_and_is_quick(room):
    """A docstring, imports, constants and definitions; what runs stands behind the guard, and what
    is slow to import inside the functions that need it."""
    body = parsed(room).body
    if ast.unparse(body[-1]).startswith("if __name__ == '__main__':"):
        body.pop()
    runs = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    assert not [node for node in body if isinstance(node, runs)]
    expressions = [node.value for node in body if isinstance(node, ast.Expr)]
    assert all(isinstance(value, ast.Constant) for value in expressions)
    assert not imports(body) & SLOW


def test_every_file_is_a_room_or_tests_one():
    """Else the map would say nothing of it."""
    files = {path.stem for path in HERE.glob("*.py")} - {"testing", "conftest"}
    assert {file for file in files if not file.startswith("test_")} == set(BELOW)


def test_a_checkpoint_is_read_in_one_place_and_never_with_code_in_it():
    """(pictures.py reads and writes its own cache, of pixels.)"""
    for room in set(BELOW) - {"checkpoint"}:
        text = (HERE / f"{room}.py").read_text()
        assert "torch.load" not in text and "torch.save" not in text, room
    assert not any("weights_only=False" in (HERE / f"{room}.py").read_text() for room in BELOW)
