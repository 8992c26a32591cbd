"""
The specification of evaluate.py: every test is a sentence about a result, its docstring the formula
or the reason.

    1 logits   2 predict   3 the numbers   4 an evaluation   5 the program   6 real processes
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
import data
import evaluate
import log
import pictures
import plots
from testing import (
    ALONE,
    DATASET,
    HERE,
    PLOTS,
    close,
    make_dataset,
    pretend,
    rng,
    run,
    save_pictures,
    small_model,
    tree,
)
from vit import VisionTransformer, ViTConfig

pytestmark = pytest.mark.usefixtures("tiny", "here")


def make_checkpoint(classes, **network):
    """What train.py would have written for these classes, without training."""
    model = small_model(K=len(classes), **network)
    recipe = {"dataset": "shapes", "data_dir": "data", "download_url": None}
    return {
        "format": checkpoint.FORMAT,
        "epoch": 3,
        "train": recipe | {"val_size": 20, "seed": 0},
        "vit": asdict(model.config),
        "classes": list(classes),
        "mean": DATASET.mean,
        "std": DATASET.std,
        "fingerprint": DATASET.fingerprint,
        "versions": {},
        "model": model.state_dict(),
    }


def program(*words):
    """The exit code of `python evaluate.py words`, in this process."""
    try:
        return evaluate.main([*map(str, words)])
    except SystemExit as exit:
        return exit.code


# ---- 1 Logits ----


class Recorder(nn.Module):
    """Logits are three fixed sums of an image; remembers what it was shown, and how."""

    def __init__(self, **network):
        super().__init__()
        self.config = ViTConfig(**network)
        self.linear = nn.Linear(3, 3)
        self.seen, self.modes = [], []

    def forward(self, images):
        self.seen.append(images)
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.linear(images.flatten(1))


@pytest.mark.parametrize("n, image_size", [(1, 32), (2345, 32), (37, 128)])
def test_every_image_is_seen_exactly_once_and_only_normalised(n, image_size):
    """In order, in eval mode, without gradients; as if it were one big batch."""
    images = torch.randint(256, (n, 3, 1, 1), generator=rng(n), dtype=torch.uint8)
    model = Recorder(image_size=image_size)
    logits = evaluate.compute_logits(model, images, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    pixels = (images.view(n, 3) / 255 - mean) / std
    close(torch.cat(model.seen).view(n, 3), pixels, 1e-5)
    close(logits, model.linear(pixels).detach(), 1e-5)
    assert set(model.modes) == {(False, False)} and logits.dtype == torch.float32


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"image_size": 128},
        {"image_size": 128, "dim": 512, "heads": 16},
        {"dim": 4096, "heads": 1},
        {"image_size": 224, "dim": 768, "heads": 12},
    ],
    ids=["cifar", "large images", "many heads", "wide", "one image is much"],
)
def test_the_memory_of_a_call_is_bounded_whatever_the_network(network):
    """The scores of a block and its hidden layer stay below half a gigabyte, or images come one by
    one. A thousand images of 128 pixels at once took 14 GB, where training them fitted."""
    model = Recorder(**network)
    images = torch.zeros(2_000, 3, 1, 1, dtype=torch.uint8)
    evaluate.compute_logits(model, images, DATASET.mean, DATASET.std)
    c, largest = model.config, max(map(len, model.seen))
    an_image = c.heads * c.num_tokens**2 + c.num_tokens * c.mlp_dim
    assert largest == 1 or 4 * largest * an_image < 2**29
    assert network or largest >= 250, "small images come in large batches"


def test_images_come_in_equal_parts():
    """A block is compiled anew for every size."""
    images = torch.zeros(10_000, 3, 1, 1, dtype=torch.uint8)
    sizes = {10_000: 625, 5_000: 625, 2_000: 500, 1_000: 500}
    patches = ((4, n, size) for n, size in sizes.items())
    for patch_size, n, size in (*patches, (16, 10_000, 1_000)):
        model = Recorder(patch_size=patch_size)
        evaluate.compute_logits(model, images[:n], DATASET.mean, DATASET.std)
        assert set(map(len, model.seen)) == {size}


def test_logits_computed_in_low_precision_are_float32():
    model = small_model()
    seen = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    statistics = (DATASET.mean, DATASET.std)
    logits = evaluate.compute_logits(model, DATASET.test_images, *statistics, torch.bfloat16)
    assert seen == [torch.bfloat16] and logits.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_found_in(training):
    model = small_model().train(training)
    evaluate.compute_logits(model, DATASET.test_images, DATASET.mean, DATASET.std)
    assert {part.training for part in model.modules()} == {training}


# ---- 2 Predict ----


def test_predict_gives_the_probabilities_of_paths_and_of_pixels(plain):
    """In three lines of Python: (N, K), a row an image, a column a class, each row sums to 1."""
    for i, image in enumerate(DATASET.test_images[:2]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{i}.png")

    best = checkpoint.load_checkpoint(str(plain / "best.pt"))
    of_paths = evaluate.predict(best, ["0.png", "1.png"])
    of_pixels = evaluate.predict(best, DATASET.test_images[:2], device="cpu")

    model = checkpoint.build_model(best)
    x = data.normalize(DATASET.test_images[:2], DATASET.mean, DATASET.std)
    expected = [[math.exp(z) for z in row] for row in model(x).tolist()]
    expected = torch.tensor([[e / sum(row) for e in row] for row in expected])
    close(of_paths, expected, 1e-6)
    assert torch.equal(of_paths, of_pixels) and of_paths.shape == (2, 3)
    for one in ("0.png", Path("0.png")):
        close(evaluate.predict(best, one), of_paths[:1], 1e-6)


def test_predict_names_the_file_that_is_no_picture(plain):
    Path("no.png").write_text("no")
    best = checkpoint.load_checkpoint(str(plain / "best.pt"))
    with pytest.raises(ValueError, match=r"no\.png"):
        evaluate.predict(best, ["no.png"])


@pytest.mark.parametrize("images", [[], DATASET.test_images[:0]])
def test_predict_refuses_nothing(images, plain):
    """As a pattern that matches no file gives it."""
    best = checkpoint.load_checkpoint(str(plain / "best.pt"))
    with pytest.raises(ValueError, match="no images"):
        evaluate.predict(best, images)


# ---- 3 The numbers ----

CASES = [(200, 4, 0), (37, 3, 1), (64, 10, 2), (1, 2, 3)]


def predictions(n, K, seed):
    """Logits and labels; the last class is never the truth, the first is never predicted."""
    logits = 2 * torch.randn(n, K, generator=rng(seed))
    logits[:, 0] = -9
    labels = torch.randint(K - 1, (n,), generator=rng(seed + 1))
    return logits, labels, [f"class {i}" for i in range(K)]


@pytest.mark.parametrize("n, K, seed", CASES)
def test_the_confusion_matrix_has_class_counts_as_rows_and_accuracy_as_trace(n, K, seed):
    """confusion[i][j]: images of class i taken for j, counted in a loop."""
    logits, labels, classes = predictions(n, K, seed)
    metrics = evaluate.measure(logits, labels, classes)
    expected = [[0] * K for _ in range(K)]
    for row, label in zip(logits.tolist(), labels.tolist()):
        expected[label][row.index(max(row))] += 1
    assert metrics["confusion_matrix"] == expected and metrics["images"] == n
    assert metrics["accuracy"] == pytest.approx(sum(expected[i][i] for i in range(K)) / n)
    assert metrics["classes"] == classes


@pytest.mark.parametrize("n, K, seed", CASES)
def test_precision_recall_and_f1_are_what_their_definitions_say(n, K, seed):
    """Of those taken for i, and of those that are i, the share that is both; their harmonic mean.

    Nothing taken for i: 0, and no nan (which JSON does not know).
    """
    logits, labels, classes = predictions(n, K, seed)
    metrics = evaluate.measure(logits, labels, classes)
    pairs = list(zip(logits.argmax(1).tolist(), labels.tolist()))
    for i in range(K):
        hits = sum(p == t == i for p, t in pairs)
        taken, there = sum(p == i for p, _ in pairs), sum(t == i for _, t in pairs)
        assert metrics["precision"][i] == pytest.approx(hits / taken if taken else 0)
        assert metrics["recall"][i] == pytest.approx(hits / there if there else 0)
        assert metrics["f1"][i] == pytest.approx(2 * hits / (taken + there) if hits else 0)
    assert "NaN" not in json.dumps(metrics)


@pytest.mark.parametrize("n, K, seed", CASES)
def test_loss_is_the_mean_over_images_of_minus_log_p(n, K, seed):
    """In float64: of a wrong answer given with all confidence float32 would make zero or inf."""
    logits, labels, classes = predictions(n, K, seed)
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        total += math.log(sum(map(math.exp, row))) - row[label]
    loss = evaluate.measure(logits, labels, classes)["loss"]
    assert loss == pytest.approx(total / n, rel=1e-12)


@pytest.mark.parametrize("n, K, seed", CASES)
def test_calibration_error_is_the_gap_between_confidence_and_accuracy_over_15_bins(n, K, seed):
    """Sum over bins of |sum of (confidence - correct)| / n; bins (0, 1/15], ..., (14/15, 1]."""
    logits, labels, classes = predictions(n, K, seed)
    gaps = [0.0] * 15
    for row, label in zip(logits.tolist(), labels.tolist()):
        confidence = max(map(math.exp, row)) / sum(map(math.exp, row))  # in float64
        [b] = [b for b in range(15) if b / 15 < confidence <= (b + 1) / 15]
        gaps[b] += confidence - (row.index(max(row)) == label)
    ece = evaluate.measure(logits, labels, classes)["ece"]
    assert ece == pytest.approx(sum(map(abs, gaps)) / n, rel=1e-12)


def test_a_confidence_on_the_edge_of_a_bin_belongs_to_the_lower_one():
    """1/3 = 5/15, wrong, and 0.34, right: in one bin the two gaps would cancel in part."""
    logits = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.34, 0.33, 0.33]], dtype=torch.float64).log()
    metrics = evaluate.measure(logits, torch.tensor([1, 0]), ["a", "b", "c"])
    assert metrics["ece"] == pytest.approx((1 / 3 + (1 - 0.34)) / 2)


def test_the_description_says_it_all_in_a_table():
    """Worked by hand: 3 cats (2 right, 1 taken for a dog), 1 dog, no eel."""
    labels, classes = torch.tensor([0, 0, 0, 1]), ["cat", "dog", "eel"]
    text = evaluate.describe(evaluate.measure(torch.eye(3)[[0, 0, 1, 1]], labels, classes))
    first, head, *rows, last = text.splitlines()
    assert first.startswith("accuracy 75.00% of 4 images | loss ") and "calibration error" in first
    assert [row.split() for row in rows] == [
        ["cat", "3", "100.00%", "66.67%", "80.00%"],
        ["dog", "1", "50.00%", "100.00%", "66.67%"],
        ["eel", "0", "0.00%", "0.00%", "0.00%"],
    ]
    assert "cat taken for dog 1x" in last and ";" not in last
    assert len({len(line) for line in (head, *rows)}) == 1


def test_the_commonest_confusions_come_first_and_are_at_most_five():
    wrong = [(0, 1)] * 3 + [(1, 2)] * 5 + [(2, 0)] + [(0, 2), (1, 0)] * 2 + [(2, 1)]
    labels, predicted = map(torch.tensor, zip(*wrong))
    text = evaluate.describe(evaluate.measure(torch.eye(3)[predicted], labels, ["a", "b", "c"]))
    mistakes = text.splitlines()[-1].partition(": ")[2].split("; ")
    assert mistakes[:2] == ["b taken for c 5x", "a taken for b 3x"] and len(mistakes) == 5


# ---- 4 An evaluation ----


def draw_it_all(classes, **network):
    """An evaluation with all its pictures, the real ones."""
    history = [dict.fromkeys(log.NAMES, 0.5) | {"epoch": e} for e in (1.0, 2.0)]
    dataset = make_dataset(classes, n=60, n_test=max(len(classes), 10))
    with pytest.MonkeyPatch.context() as patch:
        for name, plot in PLOTS.items():
            patch.setattr(plots, name, plot)
        return evaluate.evaluate(
            make_checkpoint(classes, **network) | {"fingerprint": dataset.fingerprint},
            "out",
            device="cpu",
            dataset=dataset,
            history=history,
        )


LONG = "a class whose name " + "goes on " * 17 + "and on"  # 161 letters
MANY = [f"$^$ _{{ a class with a name {i}" for i in range(21)]
PICTURES = {"attention", "confusion_matrix", "curves", "mistakes", "positions"}


@pytest.mark.parametrize(
    "classes, pool",
    [
        pytest.param(("猫", LONG), "cls", id="two"),
        pytest.param(MANY, "mean", id="many", marks=pytest.mark.slow),
    ],
)
def test_pictures_are_drawn_for_any_number_of_classes_with_any_names(classes, pool, capsys):
    """Chinese ones, formulas that are none, a name of 160 letters: without a warning."""
    metrics = draw_it_all(classes, pool=pool)
    assert json.loads(Path("out/metrics.json").read_text()) == metrics
    assert not capsys.readouterr().err
    assert {path.stem for path in Path("out").glob("*.png")} == PICTURES
    for name in PICTURES:
        with Image.open(f"out/{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 20 and max(picture.size) < 3000


@pytest.mark.parametrize("error", [RuntimeError("two\n lines"), MemoryError(), ImportError("x")])
def test_a_picture_that_fails_costs_one_line_that_names_it(error, monkeypatch, capsys):
    """And nothing else: the numbers are there, and so are the pictures after it."""
    drawn = []

    def fail(*_):
        raise error

    monkeypatch.setattr(plots, "plot_confusion_matrix", fail)
    monkeypatch.setattr(plots, "plot_positions", lambda path, *_: drawn.append(path))
    evaluate.evaluate(make_checkpoint(DATASET.classes), "out", device="cpu", dataset=DATASET)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "out/confusion_matrix.png" in line
    assert type(error).__name__ in line and str(error)[:3] in line
    assert drawn == ["out/positions.png"] and Path("out/metrics.json").exists()


def test_numbers_come_first_then_the_file_then_the_pictures(monkeypatch, capsys):
    """So that nothing that fails later can cost what was found."""
    told = []

    def picture(path, *_):
        told.append((capsys.readouterr().out, Path("out/metrics.json").exists()))

    for name in PLOTS:
        monkeypatch.setattr(plots, name, picture)
    best = make_checkpoint(DATASET.classes)
    history = [dict.fromkeys(log.NAMES)]
    evaluate.evaluate(best, "out", device="cpu", dataset=DATASET, history=history)
    assert len(told) == 5 and "accuracy" in told[0][0] and told[0][1]

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluate, "write_atomically", full)
    with pytest.raises(OSError):
        evaluate.evaluate(best, "out", device="cpu", dataset=DATASET)
    assert "accuracy" in capsys.readouterr().out


def test_the_pictures_are_named_after_the_data_and_show_images_from_all_over_the_set(monkeypatch):
    """Of 80 images every tenth would not do: of ten shapes that come in turn, it would be the same
    one eight times."""
    titles, seen = [], []
    monkeypatch.setattr(plots, "plot_positions", lambda path, model, title: titles.append(title))
    monkeypatch.setattr(plots, "plot_attention", lambda path, model, *rest: seen.append(rest))
    best = make_checkpoint(DATASET.classes)
    dataset = make_dataset(n_test=80)
    for source, data_dir in (("shapes", "data"), ("folder", "my/pets/")):
        best["train"] |= {"dataset": source, "data_dir": data_dir}
        evaluate.evaluate(best, "out", device="cpu", dataset=dataset)
    assert titles == ["shapes", "pets"]
    assert ["shapes" in seen[0][-1], "pets" in seen[1][-1]] == [True, True]
    images, labels, *_ = seen[0]
    [chosen] = [
        [
            i
            for i, image in enumerate(dataset.test_images)
            if any(torch.equal(image, x) for x in images)
        ]
    ]
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert chosen[0] == 0 and chosen[-1] == 79 and len(chosen) == 8 and max(gaps) <= 12
    assert len({i % 10 for i in chosen}) > 4 and torch.equal(labels, dataset.test_labels[chosen])
    dataset = make_dataset(n_test=5)
    evaluate.evaluate(best, "out", device="cpu", dataset=dataset)
    assert torch.equal(seen[2][0], dataset.test_images)  # of few images all


def test_pictures_that_have_moved_are_called_by_where_they_are(monkeypatch):
    titles = []
    monkeypatch.setattr(plots, "plot_positions", lambda path, model, title: titles.append(title))
    best = make_checkpoint(DATASET.classes)
    best["train"] |= {"dataset": "folder", "data_dir": "my/pets"}
    evaluate.evaluate(best, "out", data_dir="their/dogs", device="cpu", dataset=DATASET)
    assert titles == ["dogs"]


def test_the_validation_split_of_changed_pictures_is_refused(plain):
    """The same number of them in another order: most of the split was trained on."""
    best = checkpoint.load_checkpoint(str(plain / "best.pt"))
    changed = replace(DATASET, train_images=DATASET.train_images.flip(0))
    with pytest.raises(ValueError, match="the training images have changed"):
        evaluate.evaluate(best, "out", "val", device="cpu", dataset=changed)
    assert not tree()
    assert evaluate.evaluate(best, "out", "val", device="cpu", dataset=DATASET)["images"] == 20


def test_test_pictures_that_may_have_been_trained_on_cost_a_warning(plain, capsys):
    """They are drawn by their names: where a file has another name, the draw is another one. A test
    part of its own is what it was."""
    save_pictures("pets")
    best = checkpoint.load_checkpoint(str(plain / "best.pt"))
    best["train"] |= {"dataset": "folder", "data_dir": "pets/train"}
    best["fingerprint"] = data.load("folder", "pets/train", 8).fingerprint
    torch.save(best, "best.pt")

    def warnings(*flags):
        assert program("best.pt", "--device", "cpu", "--out", "new", *flags) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]

    assert not warnings()
    path = next(Path("pets/train").glob("*/*.png"))
    path.rename(path.with_name("renamed.png"))
    assert len(warnings("--out", "renamed")) == 1
    assert not warnings("--data-dir", "pets", "--out", "other")

    before = tree()  # the numbers of the pictures as they were cannot be made again
    assert program("best.pt", "--device", "cpu", "--out", "new") == 2
    assert "new/metrics.json: choose another --out" in capsys.readouterr().err
    assert tree() == before


def test_the_validation_split_is_the_datasets_own_where_it_brings_one(plain):
    best = checkpoint.load_checkpoint(str(plain / "best.pt"))
    part = {"val_images": DATASET.test_images[:7], "val_labels": DATASET.test_labels[:7]}
    own = replace(DATASET, **part)
    best["fingerprint"] = own.fingerprint
    metrics = evaluate.evaluate(best, "val", "val", device="cpu", dataset=own)
    cut = {"test_images": DATASET.test_images[:7], "test_labels": DATASET.test_labels[:7]}
    expected = evaluate.evaluate(best, "test", device="cpu", dataset=replace(DATASET, **cut))
    means = ("loss", "ece")  # of the same images in another order
    assert [metrics.pop(name) for name in means] == pytest.approx([expected.pop(n) for n in means])
    assert metrics == {**expected, "split": "val"}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_validation_split_gives_again_the_accuracy_in_the_log(ema, plain):
    """Of the chosen epoch, from the checkpoint alone: 20 images, counted exactly."""
    out = plain
    if ema:
        out = "out"
        assert run("--epochs", 4, "--seed", 5, "--ema-decay", ema, "--mixup", 0, "--cutmix", 0) == 0
    assert program(out, "--split", "val", "--device", "cpu", "--out", "new") == 0
    metrics = json.loads(Path("new/metrics_val.json").read_text())
    row = log.read_log(os.path.join(out, "log.csv"))[metrics["epoch"] - 1]
    accuracy = row["ema_accuracy"] if ema else row["val_accuracy"]
    assert metrics["images"] == 20 and metrics["split"] == "val"
    assert round(20 * metrics["accuracy"]) == pytest.approx(20 * accuracy)
    if not ema:
        assert metrics["loss"] == pytest.approx(row["val_loss"], rel=1e-6)
    assert not Path("new/metrics.json").exists()


def test_only_the_validation_split_needs_the_training_images(plain, monkeypatch):
    """A result can be tested where there is only the test set."""
    asked, load = [], data.load

    def spy(*args, only_test=False):
        asked.append(only_test)
        return load(*args)

    monkeypatch.setattr(data, "load", spy)
    for split in ("test", "val"):
        assert program(plain, "--split", split, "--device", "cpu", "--out", "new") == 0
    assert asked == [True, False]


def test_a_mirror_that_the_run_used_is_asked_again(monkeypatch):
    """Else a result could not be tested where the original is out of reach."""
    asked = []
    load = lambda *args, **_: asked.append(args) or DATASET  # noqa: E731
    monkeypatch.setattr(data, "load", load)
    best = make_checkpoint(DATASET.classes)
    best["train"]["download_url"] = "http://mirror"
    evaluate.evaluate(best, "out", device="cpu")
    assert asked == [("shapes", "data", 8, "http://mirror")]


def test_data_that_have_moved_are_named_with_the_flag_that_says_where_they_are(plain, capsys):
    """Not only what is missing, but what to do."""
    best = torch.load(plain / "best.pt", weights_only=True)
    best["train"] |= {"dataset": "folder", "data_dir": "my pets"}
    torch.save(best, "best.pt")
    assert program("best.pt", "--device", "cpu") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "my pets" in line and "--data-dir" in line
    save_pictures("moved")
    assert program("best.pt", "--data-dir", "moved", "--device", "cpu", "--out", "new") == 0
    metrics = json.loads(Path("new/metrics.json").read_text())
    assert metrics["images"] == 30


# ---- 5 The program ----


@pytest.mark.parametrize("left", ["torn", "empty", "a list", "deep", "odd", "nothing", "a folder"])
def test_metrics_that_cannot_be_read_are_none(left):
    """train.py looks whether a run was evaluated, and must not stumble over what a kill left."""
    os.makedirs("out")
    texts = {"torn": '{"epoch": 3, "acc', "empty": "", "a list": "[1]", "deep": 10**5 * "["}
    texts["odd"] = '{"epoch": 3, "data_dir": null}'
    if left in texts:
        Path("out/metrics.json").write_text(texts[left])
    if left == "a folder":
        os.makedirs("out/metrics.json")
    assert evaluate.read_metrics("out") == {}


def test_the_program_evaluates_the_test_split_from_the_checkpoint_alone(plain, monkeypatch):
    """Named by its file or by its folder, whose best.pt is meant. The same numbers that the end of
    training found, beside the checkpoint or in --out; and the curves of the log beside it."""
    logs = []
    monkeypatch.setattr(plots, "plot_curves", lambda path, rows, _: logs.append((path, rows)))
    shutil.copytree(plain, "copy")
    os.remove("copy/metrics.json")
    os.remove("copy/last.pt")
    expected = json.loads((plain / "metrics.json").read_text())
    assert program("copy/best.pt", "--device", "cpu") == 0
    assert program("copy", "--device", "cpu", "--out", "new") == 0
    for folder in ("copy", "new"):
        assert json.loads(Path(folder, "metrics.json").read_text()) == expected
    history = log.read_log(plain / "log.csv")
    assert logs == [(f"{folder}/curves.png", history) for folder in ("copy", "new")]
    assert expected["images"] == 30 and expected["split"] == "test"
    assert expected["epochs_trained"] == len(history) == 2


def test_without_a_word_the_program_looks_where_train_py_writes(plain, capsys):
    """And where no epoch has been validated yet, at what there is."""
    shutil.copytree(plain, "out")
    assert program("--device", "cpu") == 0
    assert capsys.readouterr().out.startswith("out/best.pt, epoch 1, test images\n")
    for name, told in (("best", "; there is out/last.pt"), ("last", "")):
        os.remove(f"out/{name}.pt")
        assert program("--device", "cpu") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(f"no checkpoint at out/best.pt{told}")


def test_a_checkpoint_may_lie_where_the_user_stands(plain, monkeypatch, here):
    """Named without a folder: the results go beside it."""
    shutil.copytree(plain, "out")
    os.remove("out/metrics.json")
    monkeypatch.chdir("out")
    assert program("best.pt", "--device", "cpu") == 0
    assert Path("metrics.json").read_bytes() == (plain / "metrics.json").read_bytes()


def test_a_look_at_the_last_weights_leaves_that_at_the_best_ones_alone(plain, monkeypatch):
    """Numbers and pictures lie beside those of the run's own result. (Only the curves, of the same
    log, are drawn again.)"""
    monkeypatch.setattr(plots, "draw", lambda plot, path, *_: Path(path).write_bytes(b"drawn"))
    shutil.copytree(plain, "out")
    for name in ("confusion_matrix", "attention", "mistakes", "positions"):
        for split in ("", "_val"):
            Path(f"out/{name}{split}.png").write_bytes(b"of the best")
    before = tree("out")
    for split in ("test", "val"):
        assert program("out/last.pt", "--split", split, "--device", "cpu") == 0
    after = tree("out")
    assert {name: after[name] for name in before} == before
    assert Path("out/curves.png").read_bytes() == b"drawn"
    metrics = [json.loads(Path(f"out/metrics_last{x}.json").read_text()) for x in ("", "_val")]
    assert [(m["split"], m["epoch"], m["images"]) for m in metrics] == [
        ("test", 2, 30),
        ("val", 2, 20),
    ]


def test_a_look_at_other_images_does_not_replace_that_at_the_test_set(plain, capsys):
    """Nor its pictures. The same ones by another path are no others, and those of a folder that is
    not there any more have moved."""
    shutil.copytree(plain, "out")
    assert program("out", "--data-dir", "moved", "--device", "cpu") == 0
    shutil.copy(plain / "metrics.json", "out")
    os.mkdir("data")
    before = tree()
    assert program("out", "--data-dir", "elsewhere", "--device", "cpu") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("out/metrics.json", "in data", "elsewhere", "--out"))
    assert tree() == before
    assert program("out", "--data-dir", "elsewhere", "--out", "new", "--device", "cpu") == 0
    assert program("out", "--data-dir", "./data/", "--device", "cpu") == 0
    for beside in (["out/last.pt"], ["out", "--split", "val"]):  # of which metrics.json is not
        assert program(*beside, "--data-dir", "elsewhere", "--device", "cpu") == 0


def test_a_look_at_other_images_replaces_none_in_a_folder_of_its_own_either(plain, capsys):
    for name in ("elsewhere", "a third", "data"):  # the last is where it was trained
        os.mkdir(name)
    words = (plain, "--out", "new", "--device", "cpu", "--data-dir")
    assert program(*words, "elsewhere") == 0
    before = tree()
    assert program(*words, "a third") == 2 and tree() == before
    assert "new/metrics.json is of the images in elsewhere" in capsys.readouterr().err
    assert program(plain, "--out", "new", "--device", "cpu") == 2 and tree() == before


def test_a_copy_of_earlier_weights_beside_them_does_not_replace_the_runs_numbers(plain, capsys):
    shutil.copytree(plain, "out")
    shutil.copy("out/best.pt", "out/best-50.pt")
    before = tree()
    assert program("out/best-50.pt", "--device", "cpu") == 2
    assert "out holds another run: choose another --out" in capsys.readouterr().err
    assert tree() == before
    assert program("out/best-50.pt", "--device", "cpu", "--out", "new") == 0


def test_a_look_from_one_run_does_not_replace_that_of_another(plain, capsys):
    """Nor is it drawn among the pictures that a run learns from."""
    for out in ("out", "other", "begun"):
        shutil.copytree(plain, out)
    os.remove("other/last.pt")
    os.remove("begun/best.pt")
    best = torch.load("out/best.pt", weights_only=True)
    best["train"] |= {"dataset": "folder", "data_dir": "pets"}
    torch.save(best, "out/best.pt")
    save_pictures("pets")
    shutil.copytree("pets", "moved")
    before = tree()
    for out, told in (("other", "holds another run"), ("begun", "holds another run")):
        assert program("out", "--out", out, "--device", "cpu") == 2
        assert f"--out {out} {told}" in capsys.readouterr().err and tree() == before
    for out, more in (("pets/new", ()), ("moved/new", ("--data-dir", "moved"))):
        assert program("out", "--out", out, *more, "--device", "cpu") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"--out {out} lies in --data-dir {out[:-4]}" in line and tree() == before
    for _ in range(2):
        assert program("out", "--out", "new", "--device", "cpu") == 0
    assert program(plain, "--out", "data/new", "--device", "cpu") == 0  # no pictures there


def test_the_runs_own_folder_by_another_path_is_no_other_runs(plain):
    shutil.copytree(plain, "out")
    os.symlink("out", "link")
    for way in ("./out/", "link", os.path.abspath("out")):
        assert program("out", "--out", way, "--device", "cpu") == 0


def test_a_tilde_that_the_shell_left_is_the_home_folder(plain, monkeypatch):
    """As in --out=~/new."""
    monkeypatch.setenv("HOME", os.path.abspath("home"))
    assert program(plain, "--out=~/new", "--data-dir=~/data", "--device", "cpu") == 0
    metrics = json.loads(Path("home/new/metrics.json").read_text())
    assert metrics["data_dir"] == os.path.abspath("home/data") and not Path("~").exists()


@pytest.mark.parametrize("damage", ["renamed", "semicolons", "binary", "a folder", "gone"])
def test_a_damaged_log_costs_the_curves_and_a_line_that_names_it(
    damage, plain, monkeypatch, capsys
):
    """Never the numbers."""
    drawn = []
    monkeypatch.setattr(plots, "plot_curves", lambda *_: drawn.append(1))
    shutil.copytree(plain, "out")
    os.remove("out/metrics.json")
    path = Path("out/log.csv")
    text = path.read_text()
    path.unlink()
    if damage == "renamed":
        path.write_text(text.replace("val_loss", "loss"))
    if damage == "semicolons":
        path.write_text(text.replace(",", ";"))
    if damage == "binary":
        path.write_bytes(b"\xff\xfe\x00" + text.encode("utf-16"))
    if damage == "a folder":
        path.mkdir()
    assert program("out", "--device", "cpu") == 0
    lines = capsys.readouterr().err.splitlines()
    assert Path("out/metrics.json").exists() and not drawn
    assert len(lines) == (damage != "gone") and all("out/log.csv" in line for line in lines)


def test_a_log_that_a_spreadsheet_saved_with_a_byte_order_mark_has_its_curves(plain, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot_curves", lambda path, rows, _: drawn.append(rows))
    shutil.copytree(plain, "out")
    rows = log.read_log("out/log.csv")
    Path("out/log.csv").write_bytes(b"\xef\xbb\xbf" + Path("out/log.csv").read_bytes())
    assert program("out", "--device", "cpu") == 0
    assert drawn == [rows]


def test_pictures_are_classified_with_the_three_likeliest_classes_in_aligned_columns(plain, capsys):
    """Of any size and format; the probabilities of predict()."""
    sizes = {"wide.png": (50, 20), "a very tall one.jpg": (9, 31), "dot.png": (1, 1)}
    for i, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (200, 90, 30 + 70 * i)).save(name)
    assert program(plain, "--images", *sizes, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    best = checkpoint.load_checkpoint(str(plain / "best.pt"))
    starts = set()
    for name, line, row in zip(sizes, lines, evaluate.predict(best, list(sizes)), strict=True):
        answers = sorted(zip(row.tolist(), DATASET.classes), reverse=True)
        expected = "  ".join(f"{label} {p:.1%}" for p, label in answers)
        assert line.startswith(name) and line.endswith(expected)
        starts.add(line.index(expected))
    assert len(starts) == 1
    assert not Path("metrics.json").exists()


@pytest.mark.parametrize("K, count", [(2, 2), (30, 3)])
def test_of_many_classes_the_three_likeliest_are_named_and_of_two_both(K, count, capsys):
    Image.new("RGB", (8, 8)).save("a.png")
    assert evaluate.classify(make_checkpoint([f"c{i}" for i in range(K)]), ["a.png"], "cpu") == 0
    assert capsys.readouterr().out.count("%") == count


def test_a_bad_picture_costs_its_line_and_not_the_rest(plain, monkeypatch, capsys):
    """A folder stands for the pictures in it, however deep; what is no picture there is passed
    over. What was named and cannot be read is named again, and the exit code is 2."""
    os.makedirs("album/deep")
    for name in ("album/b.png", "album/deep/a.png", "c.png"):
        Image.new("RGB", (8, 8)).save(name)
    Path("album/notes.txt").write_text("mine")
    bad = ["bad.jpg", "two\nlines.jpg", "pipe.png", "album/locked", "gone.png"]
    for name in bad[:2]:
        Path(name).write_text("no")
    os.mkfifo("pipe.png")  # to read from it would be to wait
    os.makedirs("album/locked")
    contents = pictures.contents

    def refuse(folder):
        if folder == "album/locked":
            raise PermissionError
        return contents(folder)

    monkeypatch.setattr(pictures, "contents", refuse)
    assert program(plain, "--images", *bad[:3], "album", "gone.png", "c.png") == 2
    out, err = capsys.readouterr()
    names = ["album/b.png", "album/deep/a.png", "c.png"]
    assert [line.split()[0] for line in out.splitlines()] == names
    for name, line in zip(bad, err.splitlines(), strict=True):
        assert " ".join(name.split()) in line
    os.rmdir("album/locked")
    assert program(plain, "--images", "album") == 0
    assert program(plain, "--images", "bad.jpg") == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "no checkpoint at out"),
        ("best.pt --split train", "invalid choice: 'train'"),
        ("best.pt --batch-size 3", "unrecognized arguments: --batch-size 3"),
        ("best.pt --image a.png", "unrecognized arguments: --image a.png"),
        ("best.pt --images none.png", "none.png"),
        ("best.pt --images broken.png", "broken.png"),
        ("best.pt --images empty", "cannot read the image empty"),
        ("best.pt --images a.png --split val", "--images only prints: it takes no --split"),
        ("best.pt --images a.png --out new", "it takes no --split, --data-dir or --out"),
        ("best.pt --images a.png --data-dir pets", "it takes no --split, --data-dir or --out"),
        ("best.pt --device cuda", "is not available here"),
        ("best.pt --device gpu", 'unknown device "gpu"'),
        ("best.pt --out file/new", "file"),
        ("best.pt --data-dir pics", "knows the classes cat, dog, eel; the data have ant, bee, elk"),
        ("gone.pt", "no checkpoint at gone.pt"),
        ("empty", "no checkpoint at empty/best.pt"),
        ("broken.png", "broken.png is damaged or not a checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(flags, message, plain, monkeypatch, capsys):
    """On stderr, without a traceback; nothing is written or changed."""
    pretend(monkeypatch, None)
    Path("file").write_text("mine")
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    os.makedirs("empty")
    shutil.copy(plain / "best.pt", "best.pt")
    if "pics" in flags:
        other = make_dataset(("ant", "bee", "elk"))
        monkeypatch.setattr(data, "load", lambda *_, **__: other)
    before = tree()
    assert program(*flags.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "error: " in line and message in line and tree() == before


def fail_with(monkeypatch, text):
    """The model fails like this."""

    def forward(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(VisionTransformer, "forward", forward)


@pytest.mark.parametrize("flags", ["", "--images a.png"])
def test_memory_that_is_short_is_one_line(flags, plain, monkeypatch, capsys):
    """On a GPU that is busy with training, say. Nothing is written or changed."""
    Image.new("RGB", (8, 8)).save("a.png")
    shutil.copy(plain / "best.pt", "best.pt")
    before = tree()
    fail_with(monkeypatch, "CUDA out of memory. Tried to allocate 2.00 GiB")
    assert program("best.pt", *flags.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "error: out of memory: " in line and "--device cpu" in line and tree() == before


def test_any_other_failure_of_torch_keeps_its_traceback(plain, monkeypatch):
    """A bug is not the user's to fix."""
    fail_with(monkeypatch, "CUDA error: unknown error")
    with pytest.raises(RuntimeError, match="unknown error"):
        program(plain)


# ---- 6 Real processes ----


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder: pictures in classes with Chinese names, and a checkpoint that knows them."""
    root = tmp_path_factory.mktemp("foreign")
    dataset = replace(DATASET, classes=["狗", "猫", "鳗鱼"])
    save_pictures(root / "pets", dataset)
    best = make_checkpoint(dataset.classes)
    best["train"] |= {"dataset": "folder", "data_dir": str(root / "pets")}
    os.makedirs(root / "out")
    torch.save(best, root / "out" / "best.pt")
    return root


def start(*words, **options):
    command = [sys.executable, str(HERE / "evaluate.py"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"env": ALONE, **pipes, **options})


HOSTILE = """backend: module://absent.backend
text.usetex: True
font.family: No Such Font
axes.formatter.use_mathtext: True
figure.constrained_layout.use: False
"""


@pytest.mark.slow
def test_neither_the_terminal_nor_matplotlibs_settings_can_cost_a_result(foreign, here):
    """A notebook's MPLBACKEND names a package that is not installed here, matplotlibrc wants TeX
    and a font that is not there, and the terminal has no Chinese letters: all is written."""
    Path("matplotlibrc").write_text(HOSTILE)
    settings = {
        "MPLBACKEND": "inline",
        "MATPLOTLIBRC": str(here / "matplotlibrc"),
        "PYTHONIOENCODING": "cp1252",
    }
    process = start(foreign / "out", "--out", "new", "--device", "cpu", env=ALONE | settings)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    assert r"\u72d7" in out and "accuracy" in out
    assert {path.stem for path in Path("new").glob("*.png")} == PICTURES - {"curves"}
    assert json.loads(Path("new/metrics.json").read_text())["classes"][0] == "狗"


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt])
def test_a_reader_that_goes_away_and_an_interrupt_are_not_taken_for_bad_input(
    error, plain, monkeypatch
):
    """Wherever they come, for log.run_program() knows what to do; here among the pictures."""

    def stop(*_):
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        if error is KeyboardInterrupt:
            patch.setattr(plots, "plot_positions", stop)
        else:
            patch.setattr(evaluate, "describe", stop)
        program(plain, "--device", "cpu", "--out", "new")


@pytest.mark.slow
def test_a_reader_that_goes_away_and_an_interrupt_leave_no_traceback(foreign):
    """`python evaluate.py out | head -1` and Ctrl-C: the exit codes that shells know."""
    head, stopped = (
        start(foreign / "out", "--out", f"new{i}", "--device", "cpu") for i in range(2)
    )
    assert "best.pt" in head.stdout.readline()
    head.stdout.close()
    assert "best.pt" in stopped.stdout.readline()
    stopped.send_signal(signal.SIGINT)
    for process, code in ((head, 141), (stopped, 130)):
        assert (process.wait(120), process.stderr.read()) == (code, "")
        process.stderr.close()
    stopped.stdout.close()
