"""
The specification of augment.py: every test is a sentence about pixels, its docstring the formula or
the reason.

    1 crop and flip    2 RandAugment    3 mixing    4 the batches of an epoch    5 the file

Three habits make the sentences bite:

- Tracers instead of random pictures: pixels that hold their own coordinates, or the one-hot label
  of their image, show where every value came from.
- The oracle is not the code: torchvision's own transforms, plain loops, a formula; and numbers
  are literals here, never read from augment.py.
- uint8 results are compared to the bit. Random results are counted against a bound whose
  false-alarm rate is below 1e-8; the default profile repeats the same draws anyway.

Hypothesis draws sizes and an integer seed, and every tensor is made from that seed. The axis
letters are those of augment.py.
"""

import itertools
import math
import os
import random
import re
from collections import Counter
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import augment
import data
from recipe import TrainConfig
from testing import (
    DATASET,
    assert_frequencies,
    assert_rate,
    difference,
    flat,
    key,
    noise,
    rng,
    seeds,
    sizes,
)

# ---- What the tests draw ----

fills = st.sampled_from([None, (124.6, 10, 255)])
magnitudes = st.integers(0, 30)
alphas = st.sampled_from([0.2, 0.8, 1.0])


def coordinates(n, H, W):
    """uint8 (n, 3, H, W): a pixel holds its row, its column and its image, from 1; 0 is outside."""
    axes = torch.arange(H)[:, None], torch.arange(W), torch.arange(n)[:, None, None]
    return torch.stack([axis.expand(n, H, W) + 1 for axis in axes], dim=1).to(torch.uint8)


def one_hot_images(B, H, W):
    """Float images (B, B, H, W) of B classes whose every pixel is the target of their image."""
    targets = torch.eye(B)
    return targets[:, :, None, None].repeat(1, 1, H, W), targets


def test_the_tracers_have_no_two_equal_pixels_and_none_that_is_black():
    """Support code is tested too: an ambiguous tracer would forgive."""
    pixels = coordinates(4, 5, 6).permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    assert len({tuple(pixel) for pixel in pixels}) == 4 * 5 * 6 and all(map(all, pixels))


def test_the_counting_helpers_notice_a_wrong_coin():
    """A coin that is not fair, or a face that was never announced, must not pass as fair."""
    assert_rate(500, 1000, 0.5)
    assert_frequencies(Counter(a=500, b=500), {"a": 0.5, "b": 0.5})
    for check in (
        lambda: assert_rate(600, 1000, 0.5),
        lambda: assert_frequencies(Counter(a=650, b=350), {"a": 0.5, "b": 0.5}),
        lambda: assert_frequencies(Counter(a=500, b=499, c=1), {"a": 0.5, "b": 0.5}),
    ):
        with pytest.raises(AssertionError):
            check()


# ---- 1 Crop and flip ----


def windows(image, p):
    """{bytes of the window: offset} for all (2p+1)^2 windows of the image padded with p zeros."""
    C, H, W = image.shape
    padded = np.zeros((C, H + 2 * p, W + 2 * p), np.uint8)
    padded[:, p : p + H, p : p + W] = image
    offsets = itertools.product(range(2 * p + 1), repeat=2)
    return {padded[:, y : y + H, x : x + W].tobytes(): (y, x) for y, x in offsets}


@given(sizes, st.integers(0, 3), seeds)
def test_a_crop_is_a_window_of_the_padded_image(size, padding, seed):
    """Of its own image: the tracer holds the image number."""
    images = coordinates(*size)
    for before, after in zip(images, augment.random_crop(images, padding, rng(seed)), strict=True):
        assert key(after) in windows(before, padding)


def test_every_crop_offset_occurs_and_no_other():
    """5 x 5 offsets with padding 2, equally often. (hlb-CIFAR10 never reaches the last one.)"""
    (image,) = coordinates(1, 5, 7)
    out = augment.random_crop(image.expand(5000, -1, -1, -1), 2, rng(0))
    offsets = windows(image, 2)
    counts = Counter(offsets.get(key(x)) for x in out)
    assert_frequencies(counts, dict.fromkeys(offsets.values(), 1 / 25))


@given(sizes, seeds)
def test_a_flip_yields_the_image_or_its_mirror_and_both_occur(size, seed):
    """Left to right, and each with chance 1/2: the other 1,000 flips are counted."""
    images = coordinates(*size)
    for before, after in zip(images, augment.random_flip(images, rng(seed)), strict=True):
        mirror = np.ascontiguousarray(before.numpy()[:, :, ::-1])
        assert key(after) in (key(before), mirror.tobytes())
    out = augment.random_flip(images[:1].expand(1000, -1, -1, -1), rng(seed))
    assert_rate(sum(torch.equal(x, images[0]) for x in out), 1000, 0.5)


def drawn_windows(images, scale, ratio, seed):
    """The crops, and the windows (top, left, height, width) that they were cut from."""
    with mock.patch.object(augment, "resize_windows", wraps=augment.resize_windows) as spy:
        out = augment.random_resized_crop(images, scale, ratio, rng(seed))
    return out, torch.cat([call.args[1] for call in spy.call_args_list])


@given(sizes, seeds)
@example([6, 4, 9], 0)
def test_a_resized_crop_is_a_resized_window_of_its_image(size, seed):
    """torchvision's resized_crop of the same window, in float, rounded to the nearest level."""
    N, H, W = size
    images = noise(*size, seed)
    out, drawn = drawn_windows(images, (0.1, 1.0), (0.5, 2.0), seed)
    assert out.dtype == torch.uint8 and len(drawn) == N
    for before, window, after in zip(images.float(), drawn.int().tolist(), out.float()):
        expected = tv.resized_crop(before, *window, [H, W], antialias=True)
        torch.testing.assert_close(after, expected, rtol=0, atol=0.501)


@given(sizes, seeds)
def test_a_resized_crop_keeps_to_its_area_its_ratio_and_the_image(size, seed):
    """Fraction of the area and width / height within their ranges, sides rounded to pixels; where
    ten tries found nothing that fits, the whole image."""
    _, H, W = size
    drawn = drawn_windows(noise(99, H, W, seed), (0.3, 0.6), (1.2, 1.8), seed)[1].tolist()
    for top, left, h, w in drawn:
        assert 0 <= top <= H - h and 0 <= left <= W - w and {top, left, h, w} <= set(range(10))
        if (h, w) != (H, W):
            assert (w - 0.5) * (h - 0.5) <= 0.6 * H * W and (w + 0.5) * (h + 0.5) >= 0.3 * H * W
            assert (w - 0.5) / (h + 0.5) <= 1.8 and (w + 0.5) / (h - 0.5) >= 1.2


def test_resized_crops_are_drawn_as_torchvision_draws_them():
    """Means of sides, place, area and log ratio, 20,000 here against 2,000 there, and of their
    squares: 12 numbers, each within 6 standard errors (false alarm 12 x 2e-9)."""
    H, W, scale, ratio = 24, 32, (0.08, 1.0), (3 / 4, 4 / 3)
    ours = drawn_windows(torch.zeros(20_000, 1, H, W, dtype=torch.uint8), scale, ratio, 0)[1]
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global stream
        torch.manual_seed(0)
        theirs = v2.RandomResizedCrop((H, W), scale, ratio)
        theirs = [theirs.make_params([torch.empty(3, H, W)]) for _ in range(2_000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])

    def moments(drawn):
        top, left, h, w = drawn.double().unbind(1)
        x = torch.stack([top, left, h, w, h * w, (w / h).log()])
        return torch.cat([x, x**2])

    a, b = moments(ours), moments(theirs)
    error = (a.var(1) / a.shape[1] + b.var(1) / b.shape[1]).sqrt()
    assert ((a.mean(1) - b.mean(1)).abs() < 6 * error).all()


def test_a_resized_crop_reaches_every_place():
    """A quarter of 8 x 8 is a 4 x 4 window, at 25 places, equally often."""
    images = torch.zeros(5000, 1, 8, 8, dtype=torch.uint8)
    drawn = drawn_windows(images, (0.25, 0.25), (1.0, 1.0), 0)[1]
    counts = Counter(map(tuple, drawn.int().tolist()))
    places = itertools.product(range(5), range(5), [4], [4])
    assert_frequencies(counts, dict.fromkeys(places, 1 / 25))


def test_a_window_that_can_never_fit_leaves_the_whole_image():
    """The full area at three times as wide, or high, does not fit into a square; and a thousandth
    of it has less than half a pixel to a side."""
    images = noise(5, 6, 6, 0)
    for area, ratio in ((1.0, 3.0), (1.0, 1 / 3), (0.001, 50.0), (0.001, 1 / 50)):
        out = augment.random_resized_crop(images, (area, area), (ratio, ratio), rng(0))
        assert torch.equal(out, images)


@pytest.mark.parametrize(
    "area, ratio, side",
    [(1 / 2, 2, (4, 8)), (1 / 2, 1 / 2, (8, 4)), (1 / 8, 8, (1, 8)), (1 / 8, 1 / 8, (8, 1))],
)
def test_a_window_may_be_as_long_as_the_image_and_as_thin_as_a_pixel(area, ratio, side):
    images = torch.zeros(9, 1, 8, 8, dtype=torch.uint8)
    drawn = drawn_windows(images, (area, area), (ratio, ratio), 0)[1]
    assert {tuple(window[2:]) for window in drawn.int().tolist()} == {side}


TRANSFORMS = {  # name: f(images, generator)
    "random_crop": lambda x, g: augment.random_crop(x, 2, g),
    "random_resized_crop": lambda x, g: augment.random_resized_crop(x, (0.2, 1.0), (0.5, 2.0), g),
    "random_flip": augment.random_flip,
    "rand_augment": lambda x, g: augment.rand_augment(x, 2, 9, 0.9, (1, 2, 3), g),
    "augment": lambda x, g: augment.augment(x, "pad", 2, 9, 1.0, None, g),
}
RANDOM = TRANSFORMS | {
    "mixup": lambda x, g: augment.mixup(x.float(), torch.eye(len(x)), 1.0, g)[0],
    "cutmix": lambda x, g: augment.cutmix(x, torch.eye(len(x)), 1.0, g)[0],
    "combine": lambda x, g: augment.combine(x.float(), torch.eye(len(x)), 1.0, 1.0, g)[0],
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)
every_random_function = pytest.mark.parametrize("name", RANDOM)


@every_transform
def test_images_in_a_batch_are_cropped_and_flipped_independently(name):
    """Forty equal images in, unequal ones out: torchvision's classes draw once for a batch."""
    images = noise(1, 16, 16, 0).repeat(40, 1, 1, 1)
    assert len({key(x) for x in TRANSFORMS[name](images, rng(0))}) > 1


@every_transform
def test_a_transform_keeps_shape_and_dtype_and_does_not_fear_an_empty_set(name):
    for n in (0, 1, 5):
        out = TRANSFORMS[name](noise(n, 16, 17, 0), rng(0))
        assert out.shape == (n, 3, 16, 17) and out.dtype == torch.uint8


@every_transform
def test_an_epoch_does_not_depend_on_how_it_is_cut_into_chunks(name, monkeypatch):
    """One chunk of a hundred images, or 34 chunks of three."""
    images = noise(100, 8, 9, 0)
    expected = TRANSFORMS[name](images, rng(1))
    monkeypatch.setattr(augment, "CHUNK_ON_CPU", 3 * images[0].numel())
    assert torch.equal(TRANSFORMS[name](images, rng(1)), expected)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 11])
def test_chunks_come_back_in_order_each_with_its_own_draws(n, monkeypatch):
    monkeypatch.setattr(augment, "CHUNK_ON_CPU", 5)
    images, draws = torch.arange(n)[:, None] % 100, torch.arange(n)[:, None] % 7
    out = augment.in_chunks(lambda x, d: 10 * x + d, images, draws)
    assert torch.equal(out, 10 * images + draws)


@pytest.mark.parametrize(
    "device, shape, calls",
    [
        ("meta", (50_000, 3, 32, 32), [50_000]),  # CIFAR on an accelerator: one call
        ("meta", (4_000, 3, 224, 224), [1783, 1783, 434]),  # 2^28 bytes each
        ("meta", (2, 3, 10_000, 10_000), [1, 1]),  # one at least
        ("cpu", (6_000, 3, 32, 32), [5461, 539]),  # 2^24 bytes each
    ],
)
def test_a_call_gets_as_many_images_as_its_device_handles_well(device, shape, calls):
    """Few and large ones on an accelerator. (torch's meta device has shapes and no numbers.)"""
    images, seen = torch.empty(shape, dtype=torch.uint8, device=device), []
    augment.in_chunks(lambda x, d: seen.append(len(x)) or x, images, torch.empty(shape[0]))
    assert seen == calls


@every_random_function
def test_random_functions_draw_from_their_generator_and_from_nothing_else(name):
    """The same seed gives the same result whatever the global stream holds, and leaves that be."""
    images, results = noise(12, 16, 16, 0), []
    for elsewhere in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(elsewhere)
            before = torch.get_rng_state()
            results.append(RANDOM[name](images, rng(5)))
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results) and not torch.equal(results[0], RANDOM[name](images, rng(6)))


@every_random_function
def test_a_generator_moves_on_so_that_the_next_call_differs(name):
    generator, images = rng(3), noise(12, 16, 16, 0)
    assert len({key(RANDOM[name](images, generator)) for _ in range(6)}) > 1


@every_random_function
def test_no_random_function_writes_into_its_input(name):
    images = noise(12, 16, 16, 0)
    original = images.clone()
    for seed in range(5):
        RANDOM[name](images, rng(seed))
        assert torch.equal(images, original)


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_augmentation_is_crop_then_flip_then_randaugment(crop):
    """DeiT's order. The padding is an eighth of the side (4 at 32 pixels), rounded down, the area
    80 to 100 %."""
    images, generator = noise(20, 29, 29, 0), rng(7)
    expected = images
    if crop == "pad":
        expected = augment.random_crop(expected, 3, generator)
    if crop == "resized":
        expected = augment.random_resized_crop(expected, (0.8, 1.0), (0.75, 1 / 0.75), generator)
    expected = augment.random_flip(expected, generator)
    expected = augment.rand_augment(expected, 3, 20, 0.7, (9, 8, 7), generator)
    assert torch.equal(augment.augment(images, crop, 3, 20, 0.7, (9, 8, 7), rng(7)), expected)


# ---- 2 RandAugment: one operation by torchvision, then a draw for every image ----

GEOMETRIC = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
ENHANCING = ["Brightness", "Color", "Contrast", "Sharpness"]
UNSIGNED = ["Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"]
VARIANTS = [(name, sign) for name in GEOMETRIC + ENHANCING for sign in (1, -1)]
VARIANTS += [(name, 1) for name in UNSIGNED]  # 23 different transforms at one magnitude


def by_torchvision(image, name, magnitude, sign, fill=None):
    """One operation on one image (3, H, W), or on several, by torchvision's own RandAugment."""
    policy = v2.RandAugment(num_magnitude_bins=31, fill=fill)
    strengths = policy._AUGMENTATION_SPACE[name][0](31, *image.shape[-2:])
    strength = 0.0 if strengths is None else sign * float(strengths[magnitude])
    return policy._apply_image_or_video_transform(
        image, name, strength, policy.interpolation, policy._fill
    )


def five_kinds(H, W, seed=0):
    """Noise, smooth, constant, low contrast, two values: where rounding and statistics differ."""
    a, b, c = noise(3, H, W, seed)
    channel = torch.tensor([0, 40, 80])[:, None, None]
    smooth = channel + 3 * torch.arange(H)[:, None] + 4 * torch.arange(W)
    kinds = [a, smooth, torch.full((3, H, W), 77), 100 + b % 20, 255 * (c > 127)]
    return torch.stack([kind.to(torch.uint8) for kind in kinds])


@pytest.mark.parametrize("H, W", [(32, 32), (9, 13), (2, 5)])
@pytest.mark.parametrize(
    "fill, magnitudes", [(None, range(31)), ((124.6, 10, 255), range(0, 31, 5))]
)
def test_an_operation_equals_torchvisions_to_the_bit(H, W, fill, magnitudes):
    """All 14 operations, 31 magnitudes and both signs, on five kinds of images."""
    images = five_kinds(H, W)
    for (name, sign), magnitude in itertools.product(VARIANTS, magnitudes):
        out = augment.apply_operation(images, name, magnitude, sign, fill)
        expected = by_torchvision(images, name, magnitude, sign, fill)
        assert torch.equal(out, expected), (name, magnitude, sign)


@given(sizes, magnitudes, seeds, fills)
def test_each_kernel_treats_the_images_of_a_batch_separately(size, magnitude, seed, fill):
    """f(batch)[i] = f(batch[i]): no mean, range or histogram over the batch."""
    images = noise(*size, seed) // (1 + noise(size[0], 1, 1, seed) % 5)
    for name, sign in VARIANTS:
        together = augment.apply_operation(images, name, magnitude, sign, fill)
        alone = [augment.apply_operation(x[None], name, magnitude, sign, fill)[0] for x in images]
        assert torch.equal(together, torch.stack(alone)), (name, sign)


def test_operation_strengths_are_the_published_ones():
    """At magnitude 30 (of 0..30) and 32 pixels, by formulas; at magnitude 9 a few by hand."""
    x = noise(1, 32, 32, 0)
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")

    def op(name, magnitude, sign=1):
        return augment.apply_operation(x, name, magnitude, sign)

    def moved(rows, columns):  # every pixel is read from elsewhere, black outside
        inside = (0 <= rows) & (rows < 32) & (0 <= columns) & (columns < 32)
        return x[..., rows.clamp(0, 31), columns.clamp(0, 31)] * inside

    v = x.double()
    assert torch.equal(op("TranslateX", 30), moved(row, column - 14))  # 150/331 x 32 = 14.5
    assert torch.equal(op("TranslateY", 30, -1), moved(row + 14, column))
    assert torch.equal(op("TranslateX", 9, -1), moved(row, column + 4))  # 0.3 x 14.5 = 4.35
    shift = (0.3 * (row + 0.5)).round().long()  # a tangent of 0.3, from the upper left corner
    assert torch.equal(op("ShearX", 30), moved(row, column + shift))
    assert torch.equal(op("ShearY", 30, -1), moved(row - shift.T, column))
    assert torch.equal(op("Brightness", 30), (v * 1.9).clamp(max=255).byte())
    assert torch.equal(op("Brightness", 30, -1), (v * 0.1 + 1e-9).byte())
    assert torch.equal(op("Posterize", 30), x & 0b11110000)
    assert torch.equal(op("Posterize", 9), x & 0b11111110)
    assert torch.equal(op("Solarize", 30), 255 - x)
    assert torch.equal(op("Solarize", 9), torch.where(x >= 178.5, 255 - x, x))
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))  # counter-clockwise
    down, right = row - 15.5, column - 15.5
    rows = (cos * down + sin * right + 15.5).round().long()
    columns = (cos * right - sin * down + 15.5).round().long()
    assert torch.equal(op("Rotate", 30), moved(rows, columns))
    grey = (0.2989 * v[:, :1] + 0.587 * v[:, 1:2] + 0.114 * v[:, 2:]).floor()
    for name, against in (("Color", grey), ("Contrast", grey.mean())):
        expected = (1.9 * v - 0.9 * against).clamp(0, 255)
        assert ((op(name, 30) - expected).abs() <= 1).all(), name
    blurred = torch.nn.functional.avg_pool2d(v, 3, 1) * 9 / 13 + v[..., 1:-1, 1:-1] * 4 / 13
    expected = (1.9 * v[..., 1:-1, 1:-1] - 0.9 * blurred.round()).clamp(0, 255)
    assert ((op("Sharpness", 30)[..., 1:-1, 1:-1] - expected).abs() <= 1).all()


@pytest.mark.parametrize("name", GEOMETRIC + ENHANCING + ["Posterize", "Identity"])
def test_magnitude_zero_changes_nothing(name):
    """Of those with a magnitude all but Solarize, which turns 255 into 0."""
    images = five_kinds(9, 13)
    for sign in (1, -1) if name in GEOMETRIC + ENHANCING else (1,):
        assert torch.equal(augment.apply_operation(images, name, 0, sign, (1, 2, 3)), images)


@given(sizes, magnitudes)
def test_the_fill_colour_appears_only_where_a_pixel_came_from_outside(size, magnitude):
    """Every pixel of the filled result is that of the unfilled one, or the colour where that is
    black; the tracer itself has no black pixel."""
    images, fill = coordinates(*size), torch.tensor([200, 150, 250], dtype=torch.uint8)
    for name, sign in VARIANTS:
        black = augment.apply_operation(images, name, magnitude, sign)
        filled = augment.apply_operation(images, name, magnitude, sign, tuple(fill.tolist()))
        outside = (black == 0).all(1, keepdim=True) & (name in GEOMETRIC)
        assert torch.equal(filled, torch.where(outside, fill[:, None, None], black)), name


def test_no_operation_writes_into_its_input():
    images = five_kinds(9, 13)
    original = images.clone()
    for name, sign in VARIANTS:
        augment.apply_operation(images, name, 30, sign, (1, 2, 3))
        assert torch.equal(images, original), name


@given(sizes, st.integers(0, 3), magnitudes, fills, st.sampled_from([0.5, 1.0]), seeds)
@example([1, 5, 7], 2, 9, None, 1.0, 0)  # one image: nearly all groups are empty
@example([40, 5, 7], 2, 30, (124.6, 10, 255), 1.0, 0)
def test_batched_randaugment_equals_the_per_image_loop_exactly(
    size, num_ops, magnitude, fill, prob, seed
):
    """The same draws, replayed by torchvision, image by image, one operation after the other.

    A draw is 2 x the operation's number in torchvision's list, plus 1 for a negative sign.
    """
    names = list(v2.RandAugment._AUGMENTATION_SPACE)
    images = noise(*size, seed)
    with mock.patch.object(augment, "in_chunks", wraps=augment.in_chunks) as spy:
        out = augment.rand_augment(images, num_ops, magnitude, prob, fill, rng(seed))
    draws = spy.call_args.args[2].tolist()
    assert len(draws) == len(images) and {len(slots) for slots in draws} == {num_ops}
    for before, slots, after in zip(images, draws, out):
        for slot in slots:
            sign = -1 if slot % 2 else 1
            before = by_torchvision(before, names[slot // 2], magnitude, sign, fill)
        assert torch.equal(after, before)


def outcomes(image, magnitude, num_ops, prob):
    """{bytes of a result: its chance}, over all draws of num_ops operations, by torchvision."""
    results = [(image, 1.0)]
    for _ in range(num_ops):
        after = [(x, (1 - prob) * p) for x, p in results]
        for (x, p), (name, sign) in itertools.product(results, VARIANTS):
            share = prob / 14 / (1 if name in UNSIGNED else 2)
            after.append((by_torchvision(x, name, magnitude, sign), p * share))
        results = after
    chances = Counter()
    for x, p in results:
        chances[key(x)] += p
    return {k: p for k, p in chances.items() if p > 0}


def telling_image():
    """(1, 3, 17, 18), levels 20..224: each operation changes it, and each differently. (Equalize
    needs more than 255 pixels, AutoContrast a free level, Solarize at 9 a level above 178.)"""
    return (20 + 0.8 * noise(1, 17, 18, 1)).byte()


@pytest.mark.parametrize("magnitude, prob", [(9, 1.0), (27, 0.25)])
def test_every_operation_and_both_signs_occur_at_the_stated_rate(magnitude, prob):
    """One of 14 for every image, each with chance 1/14, halved by the sign; prob applies it."""
    image = telling_image()
    expected = outcomes(image[0], magnitude, 1, prob)
    assert len(expected) == 23  # the image tells all of them apart
    out = augment.rand_augment(image.repeat(5000, 1, 1, 1), 1, magnitude, prob, generator=rng(0))
    assert_frequencies(Counter(map(key, out)), expected)


@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_two_operations_follow_each_other_and_are_drawn_independently(prob):
    """The joint distribution of all 23 x 23 ordered pairs: the second works on what the first left,
    with an operation, a sign and a chance of its own."""
    image = telling_image()
    out = augment.rand_augment(image.repeat(10_000, 1, 1, 1), 2, 9, prob, generator=rng(0))
    assert_frequencies(Counter(map(key, out)), outcomes(image[0], 9, 2, prob))


def test_by_default_randaugment_is_torchvisions():
    """Two operations at magnitude 9, always applied, black outside."""
    theirs, images = v2.RandAugment(), noise(50, 9, 13, 0)
    assert (theirs.num_ops, theirs.magnitude, theirs.num_magnitude_bins) == (2, 9, 31)
    expected = augment.rand_augment(images, 2, 9, 1.0, None, rng(0))
    assert torch.equal(augment.rand_augment(images, generator=rng(0)), expected)


@pytest.mark.parametrize("num_ops, prob", [(0, 1.0), (2, 0.0)])
def test_no_operations_or_no_chance_of_one_changes_nothing(num_ops, prob):
    images = noise(50, 9, 13, 0)
    assert torch.equal(augment.rand_augment(images, num_ops, 30, prob, (1, 2, 3), rng(0)), images)


@given(sizes, st.integers(0, 3), magnitudes, fills, seeds)
def test_randaugment_keeps_shape_and_dtype(size, num_ops, magnitude, fill, seed):
    """(Documents; the comparison with torchvision decides.)"""
    images = noise(*size, seed)
    out = augment.rand_augment(images, num_ops, magnitude, 1.0, fill, rng(seed))
    assert out.shape == images.shape and out.dtype == torch.uint8 and out.is_contiguous()


# ---- 3 Mixing ----


@given(st.integers(1, 9), st.integers(2, 12), st.floats(0, 0.99), seeds)
@example(1, 2, 0.0, 0)
def test_soft_targets_sum_to_one_and_peak_at_the_label(B, K, smoothing, seed):
    """smoothing / K everywhere and 1 - smoothing more on the label (not smoothing / (K - 1))."""
    labels = torch.randint(K, (B,), generator=rng(seed))
    out = augment.soft_targets(labels, K, smoothing)
    assert out.shape == (B, K) and out.dtype == torch.float32
    for row, label in zip(out, labels):
        expected = [smoothing / K + (1 - smoothing) * (k == label) for k in range(K)]
        torch.testing.assert_close(row, torch.tensor(expected))
        assert abs(row.sum().item() - 1) < 1e-5


def test_targets_are_not_smoothed_unless_asked():
    assert torch.equal(augment.soft_targets(torch.tensor([2, 0]), 3), torch.eye(3)[[2, 0]])


def with_share(share):
    """Within this context Beta always draws this number."""
    return mock.patch.object(augment, "draw_lambda", lambda alpha, generator: share)


@given(sizes, alphas, seeds)
def test_mixup_labels_sum_to_one(size, alpha, seed):
    """(Documents: four of five bugs keep the sum.)"""
    targets = augment.mixup(*one_hot_images(*size), alpha, rng(seed))[1]
    torch.testing.assert_close(targets.sum(1), torch.ones(size[0]))


@given(sizes, alphas, seeds)
def test_mixup_mixes_labels_by_exactly_the_amount_it_mixes_pixels(size, alpha, seed):
    """Pixels are one-hot labels, so every mixed pixel is the mixed label of its image."""
    images, targets = augment.mixup(*one_hot_images(*size), alpha, rng(seed))
    assert torch.equal(images, targets[:, :, None, None].expand_as(images))


@given(sizes, st.floats(0.1, 0.9))
@example([1, 4, 5], 0.25)
def test_mixup_blends_every_image_with_the_one_before_it(size, share):
    """lambda x_i + (1 - lambda) x_(i-1): another image for each, and each used once."""
    with with_share(share):
        targets = augment.mixup(*one_hot_images(*size), 1.0, rng(0))[1]
    expected = torch.zeros(size[0], size[0])
    for i in range(size[0]):
        expected[i, i] += share
        expected[i, i - 1] += 1 - share
    torch.testing.assert_close(targets, expected)


@given(sizes, alphas, seeds)
def test_mixup_stays_between_its_two_parents(size, alpha, seed):
    images = noise(*size, seed).float()
    mixed, _ = augment.mixup(images, torch.eye(size[0]), alpha, rng(seed))
    previous = torch.stack([images[i - 1] for i in range(size[0])])
    assert (mixed >= torch.minimum(images, previous) - 1e-3).all()
    assert (mixed <= torch.maximum(images, previous) + 1e-3).all()


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_mixup_with_lambda_one_is_the_identity_and_never_writes_to_its_input(mix):
    """Nor does CutMix; and lambda 0 is all neighbour for Mixup."""
    images, targets = noise(4, 5, 6, 0).float(), torch.eye(4)
    originals = images.clone(), targets.clone()
    for share in (1.0, 0.0, 0.4):
        with with_share(share):
            mixed = mix(images, targets, 1.0, rng(0))
        assert torch.equal(images, originals[0]) and torch.equal(targets, originals[1])
        if share == 1:
            assert torch.equal(mixed[0], images) and torch.equal(mixed[1], targets)
        if share == 0 and mix is augment.mixup:
            assert torch.equal(mixed[0], images[[3, 0, 1, 2]])
            assert torch.equal(mixed[1], targets[[3, 0, 1, 2]])


def box_of(mixed):
    """(top, bottom, left, right) of what was pasted into one-hot images."""
    pasted = torch.stack([image[i] == 0 for i, image in enumerate(mixed)])  # (B, H, W)
    assert (pasted == pasted[0]).all()  # the same box for every image
    rows, columns = (pasted[0].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert pasted[0, top:bottom, left:right].all()  # a full rectangle
    return top, bottom, left, right


@given(sizes, alphas, seeds)
def test_cutmix_label_mass_equals_the_pasted_area(size, alpha, seed):
    """Pixels are one-hot labels: their mean over the image is the mixed label; each is one or the
    other, never a blend."""
    images, targets = augment.cutmix(*one_hot_images(*size), alpha, rng(seed))
    torch.testing.assert_close(images.mean((2, 3)), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(size[0]))
    assert set(images.unique().tolist()) <= {0.0, 1.0}


@given(sizes, seeds)
def test_cutmix_pastes_the_image_before_at_the_same_place(size, seed):
    """Pixel by pixel: kept, or that of the previous image."""
    images = coordinates(*size)
    with with_share(0.5):
        mixed, _ = augment.cutmix(images, torch.eye(size[0]), 1.0, rng(seed))
    kept = (mixed == images).all(1, keepdim=True)
    previous = torch.stack([images[i - 1] for i in range(size[0])])
    assert torch.equal(mixed, torch.where(kept, images, previous)) and not kept.all()


@pytest.mark.parametrize("share", [0.81, 0.87, 0.9, 0.95, 0.98])
def test_a_whole_cutmix_box_has_its_sides_to_within_a_pixel(share):
    """sqrt(1 - lambda) of the image's: the largest of 50 boxes, which no border cuts."""
    generator, images, boxes = rng(0), one_hot_images(2, 33, 47), []
    with with_share(share):
        for _ in range(50):
            top, bottom, left, right = box_of(augment.cutmix(*images, 1.0, generator)[0])
            boxes.append((bottom - top, right - left))
    for side, found in zip((33, 47), map(max, zip(*boxes))):
        assert abs(found - side * math.sqrt(1 - share)) <= 1


def test_cutmix_boxes_are_centred_on_every_pixel_and_cut_at_the_border():
    """lambda 3/4 at 8 x 12: half of either side, so 4 x 6 around each of 96 centres, clipped.
    3,000 draws miss one of 96 equally likely boxes with a chance below 96 exp(-31) = 3e-12."""
    with with_share(0.75):
        generator, images = rng(0), one_hot_images(2, 8, 12)
        boxes = [box_of(augment.cutmix(*images, 1.0, generator)[0]) for _ in range(3000)]
    expected = Counter()
    for y, x in itertools.product(range(8), range(12)):
        expected[max(y - 2, 0), min(y + 2, 8), max(x - 3, 0), min(x + 3, 12)] += 1 / 96
    assert_frequencies(Counter(boxes), expected)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_lambda_follows_beta_alpha_alpha(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), within 6 standard errors over 4,000 draws; a
    number in [0, 1] and its square have deviations of at most 1/2 and 1/8."""
    generator = rng(0)
    x = np.array([augment.draw_lambda(alpha, generator) for _ in range(4000)])
    assert 0 <= x.min() and x.max() <= 1 and len(set(x)) > 1000
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(x.mean() - 1 / 2) < 6 * math.sqrt(variance / 4000)
    assert abs(((x - 1 / 2) ** 2).mean() - variance) < 6 / 8 / math.sqrt(4000)


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_a_mix_draws_lambda_with_its_alpha_and_its_generator(mix):
    generator = rng(0)
    with mock.patch.object(augment, "draw_lambda", return_value=0.5) as spy:
        mix(*one_hot_images(3, 4, 5), 0.7, generator)
    spy.assert_called_once_with(0.7, generator)


def test_each_alpha_moves_only_its_own_transform():
    """A refactor of torchvision's references once handed CutMix the alpha of Mixup."""
    generator, batch = rng(0), one_hot_images(3, 4, 5)
    with (
        mock.patch.object(augment, "mixup") as mixup,
        mock.patch.object(augment, "cutmix") as cutmix,
    ):
        for _ in range(100):
            augment.combine(*batch, 0.8, 0.3, generator)
    assert {call.args for call in mixup.call_args_list} == {(*batch, 0.8, generator)}
    assert {call.args for call in cutmix.call_args_list} == {(*batch, 0.3, generator)}


def kind_of_mix(images):
    """Of one-hot images: CutMix leaves every pixel one-hot, Mixup no pixel."""
    whole = ((images == 0) | (images == 1)).flatten(1).all().item()
    return "cutmix" if whole else "mixup"


def test_every_batch_is_mixed_by_one_of_the_two_and_both_occur():
    """A fair coin for each of 400 batches; one that was mixed twice would be neither."""
    generator, (images, targets) = rng(0), one_hot_images(3, 16, 16)
    counts = Counter()
    for _ in range(400):
        mixed, soft = augment.combine(images, targets, 1.0, 1.0, generator)
        counts[kind_of_mix(mixed)] += 1
        torch.testing.assert_close(mixed.mean((2, 3)), soft)
        distinct = len({key(pixel) for pixel in mixed[0].flatten(1).T})
        assert distinct == 1 or kind_of_mix(mixed) == "cutmix"
    assert_rate(counts["mixup"], 400, 0.5)


@pytest.mark.parametrize("alphas, kind", [((1.0, 0.0), "mixup"), ((0.0, 1.0), "cutmix")])
def test_an_alpha_of_zero_switches_its_transform_off(alphas, kind):
    generator, batch = rng(0), one_hot_images(3, 8, 8)
    kinds = {kind_of_mix(augment.combine(*batch, *alphas, generator)[0]) for _ in range(40)}
    assert kinds == {kind}


def test_two_alphas_of_zero_leave_the_batch_alone():
    batch = one_hot_images(3, 4, 5)
    for found, original in zip(augment.combine(*batch, 0.0, 0.0, rng(0)), batch, strict=True):
        assert torch.equal(found, original)


# ---- 4 The batches of an epoch ----


def epoch_batches(config, epoch=1, dataset=DATASET):
    """A list of (images, targets)."""
    statistics = (dataset.mean, dataset.std, len(dataset.classes))
    images, labels = dataset.train_images, dataset.train_labels
    return list(augment.epoch_batches(images, labels, *statistics, config, epoch))


def is_mixed(targets):
    """A target with two numbers in it was mixed. Beta(10, 10) never draws a lambda of 0 or 1."""
    return bool((targets.amax(1) < 0.999).any())


MIXED = {"mixup": 10.0, "cutmix": 0.0, "randaugment_ops": 0, "crop": "none"}
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "randaugment_ops": 0, "crop": "none"}


@pytest.mark.parametrize("batch_size", [6, 7, 40, 60])
def test_an_epoch_visits_every_image_at_most_once_in_a_new_order_and_drops_only_the_tail(
    batch_size,
):
    """Without augmentation a batch is normalised pictures, (x / 255 - mean) / std, perhaps
    mirrored, and smoothed labels: 1 - e + e / K on the label, e / K elsewhere."""
    config = TrainConfig(batch_size=batch_size, label_smoothing=0.3, **PLAIN)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (DATASET.mean, DATASET.std))
    originals = (DATASET.train_images / 255 - mean) / std
    before = DATASET.train_images.clone()
    orders = []
    for epoch in (1, 2):
        seen = []
        for images, targets in epoch_batches(config, epoch):
            assert images.shape == (batch_size, 3, 8, 8) and images.dtype == torch.float32
            for image, target in zip(images, targets, strict=True):
                mirrored = originals.flip(-1)
                distance = torch.minimum(
                    *[(o - image).abs().amax((1, 2, 3)) for o in (originals, mirrored)]
                )
                seen.append(distance.argmin().item())
                assert distance.min() < 1e-5
                expected = torch.full((3,), 0.1)
                expected[DATASET.train_labels[seen[-1]]] += 0.7
                torch.testing.assert_close(target, expected)
        assert len(seen) == len(set(seen)) == 60 // batch_size * batch_size
        orders.append(seen)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    assert torch.equal(DATASET.train_images, before)


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    """In any order, whatever the global streams are at, from which nothing is drawn; and run s + 1
    is not run s an epoch later."""
    pairs = [(0, 1), (0, 2), (1, 1), (1, 0), (7, 3)]
    first, again = {}, {}
    for i, (found, order) in enumerate([(first, pairs), (again, pairs[::-1])]):
        torch.manual_seed(i), random.seed(i), np.random.seed(i)
        before = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
        for seed, epoch in order:
            config = TrainConfig(batch_size=10, seed=seed, mix_prob=0.5)
            found[seed, epoch] = flat(epoch_batches(config, epoch))
        after = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
        assert difference(flat(before), flat(after)) is None
    for pair in pairs:
        assert difference(first[pair], again[pair]) is None
    for a, b in itertools.combinations(pairs, 2):
        assert difference(first[a], first[b]), (a, b)


def test_no_two_runs_share_the_randomness_of_an_epoch():
    """Nor does a long one repeat itself. (A CPU's generator reads the low 32 bits of a seed.)"""
    pairs = itertools.product(range(10), range(1, 10_001))
    assert len({augment.epoch_seed(*pair) % 2**32 for pair in pairs}) == 100_000


@pytest.mark.parametrize(
    "epochs, share, mixed", [(10, 0.5, 5), (3, 1.0, 3), (4, 0.0, 0), (10, 0.45, 4)]
)
def test_mixing_ends_after_the_stated_share_of_the_epochs(epochs, share, mixed):
    config = TrainConfig(batch_size=20, epochs=epochs, mix_until=share, **MIXED)
    found = [{is_mixed(t) for _, t in epoch_batches(config, e)} for e in range(1, epochs + 1)]
    assert found == [{True}] * mixed + [{False}] * (epochs - mixed)


def test_two_hundred_and_twenty_epochs_are_mixed_where_that_share_is_stated():
    """220 / 300 * 300 is 219.99999999999997."""
    config = TrainConfig(batch_size=20, mix_until=220 / 300, **MIXED)
    for epoch, mixed in ((220, True), (221, False)):
        assert {is_mixed(t) for _, t in epoch_batches(config, epoch)} == {mixed}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_stated_share_of_the_batches_is_mixed(share):
    """Of 300 batches, within six standard deviations of their number."""
    config = TrainConfig(batch_size=10, mix_prob=share, **MIXED)
    mixed = sum(is_mixed(t) for epoch in range(1, 51) for _, t in epoch_batches(config, epoch))
    assert abs(mixed - 300 * share) <= 6 * math.sqrt(300 * share * (1 - share))


def test_labels_are_smoothed_to_the_last_epoch():
    """Also in those that are no longer mixed."""
    config = TrainConfig(batch_size=6, epochs=2, mix_until=0.5, label_smoothing=0.3)
    for _, targets in epoch_batches(config, 2):
        assert targets.amax(1).tolist() == pytest.approx([0.8] * 6)
        assert targets.amin(1).tolist() == pytest.approx([0.1] * 6)


@pytest.mark.parametrize("epoch", [1, 2])
def test_the_whole_policy_reaches_the_augmentation_of_every_epoch(epoch, monkeypatch):
    """The fill of RandAugment is black or the mean colour, in 0..255. Mixing ends after epoch 1."""
    seen = []
    spy = lambda images, *policy: seen.append(policy[:-1]) or images  # noqa: E731
    monkeypatch.setattr(augment, "augment", spy)
    for fill in ("black", "mean"):
        policy = {"randaugment_magnitude": 7, "randaugment_prob": 0.25, "randaugment_fill": fill}
        policy |= {"crop": "resized", "randaugment_ops": 3}
        epoch_batches(TrainConfig(batch_size=6, epochs=2, mix_until=0.5, **policy), epoch)
    assert seen[0] == ("resized", 3, 7, 0.25, None)
    assert seen[1][:4] == ("resized", 3, 7, 0.25)
    assert seen[1][4] == pytest.approx((0.4 * 255, 0.45 * 255, 0.5 * 255))


# ---- 5 The file ----


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--image-size 0", "image_size must be at least 1, got 0"),
        ("--dataset mnist", 'got "mnist"'),
        ("--nope", "unrecognized arguments: --nope"),
        ("--image-size " + 400 * "9", "int too "),
        ("--out nowhere/a.png", "nowhere/a.png"),
        ("--dataset folder --data-dir=~/none", os.path.expanduser("~/none")),
        ("--out a.jpug", "jpug"),
    ],
)
def test_bad_input_to_the_program_is_one_line_and_exit_code_two(
    flags, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    small = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda n, size, seed: small(10, size, seed))
    with pytest.raises(SystemExit) as stopped:
        augment.main([*"--image-size 8".split(), *flags.split()])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "error: " in line and complaint in line
    assert not list(tmp_path.iterdir())


def test_the_program_draws_every_augmentation_into_a_picture(tmp_path, monkeypatch, capsys):
    """Among them every operation at its strongest, the signed ones in both directions."""
    small = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda n, size, seed: small(10, size, seed))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a.png"
    with mock.patch.object(augment, "apply_operation", wraps=augment.apply_operation) as spy:
        augment.main(["--out=~/a.png", "--image-size", "16"])  # shells leave this ~ as it is
    drawn = {call.args[1:4] for call in spy.call_args_list}  # name, magnitude, sign
    assert {(name, 30, sign) for name, sign in VARIANTS if name != "Identity"} <= drawn
    assert {(name, sign) for name, _, sign in drawn} <= set(VARIANTS)
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(10**6)) > 1000


def test_the_picture_goes_where_the_user_says_even_without_a_suffix(tmp_path, monkeypatch, capsys):
    small = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda n, size, seed: small(10, size, seed))
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context({"text.usetex": True}):  # whatever matplotlibrc says
        augment.main(["--out", "draws", "--image-size", "16"])
    assert [path.name for path in tmp_path.iterdir()] == ["draws"]
    assert capsys.readouterr().out == "wrote draws\n"
    with Image.open("draws") as picture:
        assert picture.format == "PNG"
    with pytest.raises(SystemExit):
        augment.main(["--out", ".", "--image-size", "16"])
    assert "Is a directory" in capsys.readouterr().err


def test_a_row_of_the_picture_is_what_its_name_says(tmp_path, monkeypatch):
    """One picture many times over, untouched, cropped, mirrored or augmented; a mix beside its
    shares."""
    small, rows = data.draw_shapes, {}

    def imshow(axis, pixels, real=Axes.imshow):
        axis.pixels = pixels
        return real(axis, pixels)

    def set_ylabel(axis, name, **_):
        rows[name] = axis.pixels

    monkeypatch.setattr(data, "draw_shapes", lambda n, size, seed: small(10, size, seed))
    monkeypatch.setattr(Axes, "imshow", imshow)
    monkeypatch.setattr(Axes, "set_ylabel", set_ylabel)
    augment.main(["--out", str(tmp_path / "a.png"), "--image-size", "16"])
    cells = {}  # name -> (6, 16, 16, 3), without the frames
    for name, pixels in rows.items():
        cells[name] = torch.from_numpy(pixels).unflatten(1, (6, 18))[1:-1, :, 1:-1].transpose(0, 1)
    one, some = cells["an image"], cells["a batch"].float()
    assert torch.equal(one, one[:1].expand_as(one))
    drawn = [cell for name, cell in cells.items() if name.startswith("rand")]
    assert len(drawn) == 5 and not any(torch.equal(cell, one) for cell in drawn)
    both = {tuple(x.flatten().tolist()) for x in (one[0], one[0].flip(1))}
    assert {tuple(x.flatten().tolist()) for x in cells["random_flip"]} == both
    padded = torch.zeros(20, 20, 3)
    padded[2:-2, 2:-2] = one[0]
    places = [(y, x) for y in range(5) for x in range(5)]
    for cell in cells["random_crop"]:
        assert any(torch.equal(cell, padded[y : y + 16, x : x + 16].byte()) for y, x in places)
    [mix] = [name for name in cells if name.startswith("mixup")]
    own, other = (int(share) / 100 for share in re.findall(r"(\d+)%", mix))
    assert (cells[mix] - (own * some + other * some.roll(1, 0))).abs().max() < 3
