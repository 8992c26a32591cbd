"""
The specification of plots.py. Of a picture it is tested what it shows, read from Matplotlib's own
axes, and not that a file is there.
"""

import itertools
import math
import os

import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image, ImageChops

import data
import plots
from testing import DATASET, close, rng, small_model
from vit import VisionTransformer, ViTConfig

LONG_NAMES = ["flamingos in water, at home", "flamingos in water, abroad", "golden retrievers, wet"]


def scrambled(seed=0, **network):
    """A small model in eval mode that attends to some patches more than to others."""
    model = small_model(seed, **network).eval()
    for p in model.parameters():
        p.data.normal_(generator=rng(seed))
    return model


@pytest.fixture
def axes(monkeypatch):
    """The axes of the next picture, in reading order; nothing is written."""
    from matplotlib.figure import Figure

    found, real = [], Figure.subplots

    def subplots(figure, *args, **options):
        grid = real(figure, *args, **options)
        found.extend(grid.flat)
        return grid

    monkeypatch.setattr(Figure, "subplots", subplots)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    return found


def shown(image):
    """What an imshow() shows, as a tensor."""
    return torch.tensor(image.get_array().filled())


def test_drawing_leaves_matplotlibs_settings_as_they_were(monkeypatch):
    """They are the notebook's that called: its next plot appears below its cell, as before."""
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "inline")
    with matplotlib.rc_context({"font.size": 33, "text.parse_math": True}):
        before, environment = dict(matplotlib.rcParams), dict(os.environ)
        seen = []
        plots.draw(lambda path: seen.append(matplotlib.rcParams["font.size"]), "a.png")
        assert seen != [33] and dict(matplotlib.rcParams) == before
    assert dict(os.environ) == environment


def test_no_word_of_a_picture_is_cut_off(tmp_path):
    """Two classes, one image and four patches make the smallest pictures, here with long words. All
    around is a white edge."""
    model, title = small_model().eval(), "my own pictures of everything I saw, test images"
    wide = ["W" * 30, "M" * 30]  # which leave the least room for the squares
    confusion = {"confusion_matrix": [[3, 1], [0, 2]], "classes": wide, "accuracy": 0.5}
    images, labels = DATASET.test_images[:1], DATASET.test_labels[:1]
    logits = torch.eye(3)[(labels + 1) % 3]
    pixels = (model, images, labels, LONG_NAMES, DATASET.mean, DATASET.std)
    history = [{"epoch": e, "train_loss": 10.0**-e, "lr": 1e-7 * e} for e in (1, 2)]
    for plot, *arguments in (
        (plots.plot_confusion_matrix, confusion, title),
        (plots.plot_curves, history, title),
        (plots.plot_attention, *pixels, title),
        (plots.plot_mistakes, images, labels, logits, LONG_NAMES, title),
        (plots.plot_positions, model, title),
    ):
        path = tmp_path / f"{plot.__name__}.png"
        plots.draw(plot, str(path), *arguments)
        with Image.open(path) as picture:
            inside = ImageChops.invert(picture.convert("L")).getbbox()  # of what is not white
            (left, top, right, bottom), (width, height) = inside, picture.size
            assert min(left, top, width - right, height - bottom) >= 3


def test_the_data_are_called_what_they_are_and_a_folder_by_its_own_name():
    """As "folder" says nothing."""
    names = [plots.title_of(source, "my/pets/") for source in ("cifar10", "shapes", "folder")]
    assert names == ["cifar10", "shapes", "pets"]
    assert plots.title_of("folder", ".") == os.path.basename(os.getcwd())


def test_a_name_that_is_cut_says_so():
    assert plots.short("ab", 2) == "ab" and plots.short("abc", 2) == "a…"


def test_the_picture_of_the_confusion_matrix_shows_shares_of_the_true_class(axes):
    """A row is a true class and sums to 1, or to 0 for one that never occurs; counts are written
    into their squares."""
    confusion = [[3, 1, 0], [0, 2, 4], [0, 0, 0]]
    metrics = {"confusion_matrix": confusion, "classes": ["cat", "dog", "eel"], "accuracy": 0.5}
    plots.plot_confusion_matrix("", metrics, "pets")
    [axis] = axes
    expected = torch.tensor([[3 / 4, 1 / 4, 0], [0, 1 / 3, 2 / 3], [0, 0, 0]])
    close(shown(axis.images[0]).float(), expected, 1e-6)
    assert axis.images[0].get_clim() == (0, 1)
    counts = {text.get_position(): int(text.get_text()) for text in axis.texts}
    assert counts == {(j, i): n for i, row in enumerate(confusion) for j, n in enumerate(row) if n}
    for text in axis.texts:
        x, y = text.get_position()
        square = sum(axis.images[0].cmap(expected[y, x].item())[:3]) / 3
        assert abs(square - sum(to_rgb(text.get_color())) / 3) > 0.4  # it can be read
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == metrics["classes"]
    assert "true" in axis.get_ylabel() and "predicted" in axis.get_xlabel()
    assert "pets" in axis.get_title() and "50.00%" in axis.get_title()


@pytest.mark.parametrize("K, written", [(20, 20), (21, 0)])
def test_counts_are_written_into_the_squares_while_they_can_be_read(K, written, axes):
    metrics = {"confusion_matrix": torch.eye(K).long().tolist(), "classes": ["a"] * K}
    plots.plot_confusion_matrix("", {**metrics, "accuracy": 1.0}, "")
    assert len(axes[0].texts) == written


def test_the_confusion_matrix_of_a_thousand_classes_is_no_larger_than_that_of_a_hundred(
    monkeypatch,
):
    """At half an inch a class it would take gigabytes, after the last epoch."""
    sizes = []

    def figure(figsize):
        sizes.append(figsize)
        raise MemoryError

    monkeypatch.setattr(plots, "new_figure", figure)
    for K in (10, 100, 1000):
        metrics = {"confusion_matrix": [[0] * K] * K, "classes": ["a"] * K}
        with pytest.raises(MemoryError):
            plots.plot_confusion_matrix("", metrics, "")
    assert sizes[0] < sizes[1] == sizes[2]


def test_the_curves_are_the_columns_of_the_log_and_accuracies_are_percent(axes):
    """Each under its own name; an epoch without a number is left out."""
    rows = [
        {"epoch": 1, "lr": 0.1, "train_loss": 2.5, "val_loss": 2.0, "train_accuracy": 0.1}
        | {"val_accuracy": 0.2, "ema_accuracy": 0.3},
        {"epoch": 2, "lr": 0.2, "train_loss": 2.25, "val_loss": None, "train_accuracy": None},
        {"epoch": 3, "lr": 0.0, "train_loss": 2.0, "val_loss": 1.5, "train_accuracy": 0.4}
        | {"val_accuracy": 0.5, "ema_accuracy": 0.6},
    ]
    plots.plot_curves("", rows, "pets")
    curves = [
        {line.get_label(): line.get_xydata().round(9).tolist() for line in axis.lines}
        for axis in axes
    ]
    assert [list(curve.values()) for curve in curves] == [
        [[[1, 2.5], [2, 2.25], [3, 2.0]], [[1, 2.0], [3, 1.5]]],
        [[[1, 10], [3, 40]], [[1, 20], [3, 50]], [[1, 30], [3, 60]]],
        [[[1, 0.1], [2, 0.2], [3, 0.0]]],
    ]
    words = [["training", "validation"], ["training", "validation", "averaged"], [""]]
    for axis, of_axis in zip(curves, words, strict=True):
        assert all(word in label for word, label in zip(of_axis, axis, strict=True))
    assert "loss" in axes[0].get_title() and "%" in axes[1].get_title()


def test_the_curves_of_one_epoch_can_be_seen(axes):
    """A line through a single point is none."""
    row = {"epoch": 1, "lr": 0.1, "train_loss": 2.5, "val_loss": 2.0, "val_accuracy": 0.2}
    plots.plot_curves("", [row], "pets")
    for axis in axes:
        assert axis.lines and all(line.get_marker() not in ("None", None) for line in axis.lines)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_curves_say_which_is_which_and_of_what_they_are(epochs, axes):
    """And an epoch is a whole number."""
    row = {"lr": 0.1, "train_loss": 2.5, "val_loss": 2.0}
    rows = [{"epoch": 1 + i, **row} for i in range(epochs)]
    plots.plot_curves("", rows, "pets")
    assert all(tick == round(tick) for axis in axes[::2] for tick in axis.get_xticks())
    for axis in (axes[0], axes[2]):
        named = [text.get_text() for text in axis.get_legend().get_texts()]
        assert named == [line.get_label() for line in axis.lines]
    assert "pets" in axes[0].figure.get_suptitle()


def test_attention_rollout_is_the_product_of_half_attention_half_identity():
    """The product over blocks, last one leftmost, of (mean over heads + 1) / 2, in loops."""
    L, B, h, N = 3, 2, 4, 5
    maps = torch.randn(L, B, h, N, N, generator=rng(0), dtype=torch.float64).softmax(-1)
    rollout = plots.attention_rollout(maps)
    for b in range(B):
        expected = [[float(i == j) for j in range(N)] for i in range(N)]
        for block in range(L):
            flow = [
                [(sum(maps[block, b, :, i, j].tolist()) / h + (i == j)) / 2 for j in range(N)]
                for i in range(N)
            ]
            expected = [
                [sum(flow[i][k] * expected[k][j] for k in range(N)) for j in range(N)]
                for i in range(N)
            ]
        close(rollout[b], torch.tensor(expected, dtype=torch.float64))
    close(rollout.sum(-1), torch.ones(B, N, dtype=torch.float64))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_attention_picture_is_hottest_where_the_rollout_is_highest(pool, axes):
    """What the answer is made of: row 0 of the rollout without its own column, or the mean of all
    rows, from the least to the most of each picture. Above it, what it is and is taken for."""
    model = scrambled(pool=pool, patch_size=2)
    images = torch.randint(256, (3, 3, 8, 8), generator=rng(1), dtype=torch.uint8)
    statistics = (DATASET.mean, DATASET.std)
    labels, classes = torch.tensor([2, 0, 1]), ["cat", "dog", "eel"]
    plots.plot_attention("", model, images, labels, classes, *statistics, "pets")
    x = data.normalize(images, *statistics)
    rollout = plots.attention_rollout(model.attention_maps(x))  # (B, N, N)
    flows = rollout[:, 0, 1:] if pool == "cls" else sum(rollout.unbind(1)) / 16
    for i, (flow, probabilities) in enumerate(zip(flows, model(x).softmax(1))):
        original, below = axes[i], axes[3 + i]
        assert torch.equal(shown(original.images[0]), images[i].permute(1, 2, 0))
        grey, heat = below.images
        close(shown(heat).float().flatten(), (flow - flow.min()) / (flow.max() - flow.min()), 1e-4)
        assert shown(heat).min() == 0 and shown(heat).max() == 1
        assert heat.get_extent() == grey.get_extent() and heat.get_clim() == (0, 1)
        close(shown(grey).double(), images[i].double().mean(0), 1e-3)
        assert sum(heat.cmap(1.0)[:3]) > sum(heat.cmap(0.0)[:3])  # the most is bright
        answer = probabilities.argmax().item()
        is_called, taken_for = original.get_title().split("\ntaken for\n")
        assert is_called == classes[labels[i]]
        assert taken_for == f"{classes[answer]} {probabilities[answer]:.0%}"
    *_, bar = axes[0].figure.axes
    ends = zip(bar.get_yticks(), bar.get_yticklabels(), strict=True)
    assert [(at, end.get_text()) for at, end in ends] == [(0, "least"), (1, "most")]


def test_the_attention_of_pictures_is_computed_one_by_one_and_of_eight_at_most(axes, monkeypatch):
    """All maps of many tokens are gigabytes."""
    model, seen = small_model().eval(), []
    real = model.attention_maps
    monkeypatch.setattr(model, "attention_maps", lambda x: seen.append(len(x)) or real(x))
    images, labels = DATASET.test_images, DATASET.test_labels
    classes, statistics = DATASET.classes, (DATASET.mean, DATASET.std)
    plots.plot_attention("", model, images, labels, classes, *statistics, "")
    assert seen == [1] * 8


@pytest.mark.parametrize("patch_size, pool", [(4, "cls"), (1, "cls"), (1, "mean")])
def test_where_all_patches_count_alike_the_attention_picture_is_even(patch_size, pool, axes):
    """Not divided by a range of zero, nor by one that is all rounding, as in float32."""
    model = small_model(patch_size=patch_size, pool=pool, depth=3).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.zero_()
    labels, classes = torch.tensor([1]), ["cat", "dog", "eel"]
    statistics = (DATASET.mean, DATASET.std)
    plots.plot_attention("", model, DATASET.test_images[:1], labels, classes, *statistics, "")
    assert shown(axes[1].images[1]).max() < 0.1


@pytest.mark.parametrize("n", [1, 8])
def test_what_stands_above_one_image_does_not_reach_into_the_next(n, axes):
    """Whatever the names of the classes are, and the percentage has three digits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    model = small_model().eval()
    model.head.weight.data.zero_()
    model.head.bias.data[0] = 99
    images, labels = DATASET.test_images[:n], DATASET.test_labels[:n]
    statistics = (DATASET.mean, DATASET.std)
    plots.plot_attention("", model, images, labels, LONG_NAMES, *statistics, "")
    logits = torch.eye(3)[(labels + 1) % 3] * 99
    plots.plot_mistakes("", images, labels, logits, LONG_NAMES, "")
    for row in (axes[:n], axes[2 * n :][:n][:5]):  # the first row of each picture
        figure = row[0].figure
        FigureCanvasAgg(figure).draw()
        boxes = [axis.title.get_window_extent() for axis in row]
        assert all(box.width > 0 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_the_mistakes_are_the_wrong_answers_the_model_was_surest_of(axes):
    logits = torch.tensor([[3.0, 0], [0, 2.0], [0, 5.0], [4.0, 0], [1.0, 0]])
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    labels = torch.tensor([1, 0, 1, 0, 1])
    plots.plot_mistakes("", images, labels, logits, ["cat", "dog"], "pets")
    seen = [(int(shown(axis.images[0])[0, 0, 0]), axis.get_title()) for axis in axes if axis.images]
    assert [image for image, _ in seen] == [0, 1, 4]
    for (_, title), (answer, confidence, truth) in zip(
        seen, [("cat", "95%", "dog"), ("dog", "88%", "cat"), ("cat", "73%", "dog")]
    ):
        first, second = title.splitlines()
        assert answer in first and confidence in first and truth in second
    assert "3 of 3 mistakes, most confident" in axes[0].figure.get_suptitle()


def test_of_many_mistakes_twenty_are_shown_and_the_title_counts_them_all(axes):
    images = torch.zeros(25, 3, 4, 4, dtype=torch.uint8)
    logits = torch.tensor([[1.0, 0]]).expand(25, 2)
    plots.plot_mistakes("", images, torch.ones(25).long(), logits, ["cat", "dog"], "pets")
    assert sum(bool(axis.images) for axis in axes) == 20
    assert "20 of 25 mistakes" in axes[0].figure.get_suptitle()


def test_without_a_mistake_the_picture_says_so(axes):
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    plots.plot_mistakes("", images, torch.tensor([0, 1]), torch.eye(2), ["cat", "dog"], "pets")
    assert "no mistakes" in axes[0].figure.get_suptitle()
    assert not any(axis.images for axis in axes)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_picture_of_positions_compares_each_patch_with_all_others(pool, axes):
    """Cosine of the angle between their positions, in loops; the class token's, which is the first
    row of the table, is no patch's."""
    model = scrambled(pool=pool)
    plots.plot_positions("", model, "pets")
    rows = model.pos_embed.detach()[0].tolist()[-4:]

    def cosine(a, b):
        lengths = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b)) / lengths

    assert len(axes) == 4
    for patch, axis in zip(rows, axes):
        expected = torch.tensor([[cosine(patch, rows[2 * y + x]) for x in (0, 1)] for y in (0, 1)])
        close(shown(axis.images[0]).float(), expected, 1e-5)
        assert axis.images[0].get_clim() == (-1, 1)


def test_of_many_patches_at_most_eight_by_eight_are_compared(axes):
    """Ten a side: every second, each with its own place brightest."""
    model = VisionTransformer(ViTConfig(10, 1, dim=16, depth=1, heads=1))
    model.pos_embed.data.normal_(generator=rng(0))
    plots.plot_positions("", model, "pets")
    assert len(axes) == 25
    for i, axis in enumerate(axes):
        row, column = divmod(i, 5)
        assert shown(axis.images[0]).argmax() == 10 * 2 * row + 2 * column
