"""
Augmentation: what training does to the pixels of an epoch, on whole batches and on any device.

    augment     uint8 (N, 3, H, W) -> uint8 (N, 3, H, W): crop, flip, RandAugment,
                                      a whole epoch in one call
    combine     float32 (B, 3, H, W), targets (B, K) -> the same: mixup or cutmix of a batch
    epoch_batches      both, for the batches of an epoch

Crop, flip and RandAugment draw anew for every image, mixup and cutmix once for a batch. Every
random function draws from the CPU torch.Generator it is given and from nothing else, so one seed
gives the same draws on every device. No function writes into its input.

Axes:  N images (tokens in vit.py)   B batch   C = 3 channels   H, W image height and width
       K classes

`python augment.py` draws what all this does to an image.
"""

import argparse
import math
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import data

# torchvision is imported where it is used: it is slow to import, and --help need not wait.

# --- crop and flip --------------------------------------------------------------------------------

# How many pixel values one call handles: few enough for a CPU's cache; an accelerator likes few and
# large calls, and all of CIFAR-10 is one.
CHUNK_ON_CPU, CHUNK_ON_ACCELERATOR = 2**24, 2**28


def in_chunks(transform, images: Tensor, draws: Tensor) -> Tensor:
    """transform(images, draws), a part of the images at a time. draws: (N, ...), one an image."""
    values = CHUNK_ON_CPU if images.device.type == "cpu" else CHUNK_ON_ACCELERATOR
    count = max(1, values // math.prod(images.shape[1:]))
    out = torch.empty_like(images)
    for part, *inputs in zip(out.split(count), images.split(count), draws.split(count)):
        part.copy_(transform(*inputs))
    return out


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """uint8 (N, C, H, W) -> the same: pad with black, cut a window of the old size anywhere.

    Every image draws one of the (2 padding + 1)^2 offsets.
    """

    def cut(images, offsets):
        N, C, H, W = images.shape
        y, x = offsets.to(images.device).unbind(1)
        padded = F.pad(images, (padding,) * 4)
        # A view of all windows at once, in which nothing is copied: (N, C, 2p+1, 2p+1, H, W).
        windows = padded.unfold(2, H, 1).unfold(3, W, 1)
        return windows[torch.arange(N, device=images.device), :, y, x]  # (N, C, H, W)

    offsets = torch.randint(2 * padding + 1, (len(images), 2), generator=generator)
    return in_chunks(cut, images, offsets)


def random_resized_crop(images: Tensor, scale: tuple, ratio: tuple, generator: Generator) -> Tensor:
    """uint8 (N, C, H, W) -> the same: a window of random area and aspect, resized bilinearly.

    scale: limits of the window's area as a fraction of the image's; ratio: of its width / height.
    The crop of GoogLeNet (Szegedy 2015) as torchvision's RandomResizedCrop draws it for a square
    image: ten tries, then the whole.
    """
    N, C, H, W = images.shape
    area = H * W * (scale[0] + (scale[1] - scale[0]) * torch.rand(N, 10, generator=generator))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** torch.rand(N, 10, generator=generator)
    width = (area * aspect).sqrt().round()
    height = (area / aspect).sqrt().round()
    fits = (0 < width) & (width <= W) & (0 < height) & (height <= H)
    first = fits.int().argmax(1, keepdim=True)  # the first try that fits
    width = torch.where(fits.any(1), width.gather(1, first)[:, 0], W)  # (N,)
    height = torch.where(fits.any(1), height.gather(1, first)[:, 0], H)
    top, left = torch.rand(2, N, generator=generator)
    top, left = (top * (H - height + 1)).floor(), (left * (W - width + 1)).floor()
    return in_chunks(resize_windows, images, torch.stack([top, left, height, width], dim=1))


def resize_windows(images: Tensor, windows: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> the same: a window of each image, resized to the image's size.

    windows: (N, 4), each (top, left, height, width) in pixels.
    """

    def centres(start, length, total):  # where the middle of each new pixel falls, in -1..1
        new = (torch.arange(total, device=images.device) + 0.5) / total
        length = length[:, None]
        old = start[:, None] + (new * length - 0.5).clamp(min=0).minimum(length - 1)  # in pixels
        return (old + 0.5) * 2 / total - 1  # (N, total)

    N, C, H, W = images.shape
    top, left, height, width = windows.to(images.device).unbind(1)
    y, x = centres(top, height, H), centres(left, width, W)
    x, y = x[:, None, :].expand(N, H, W), y[:, :, None].expand(N, H, W)
    grid = torch.stack([x, y], dim=-1)  # (N, H, W, 2)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """uint8 (N, C, H, W) -> the same: each image mirrored left to right with probability 1/2."""

    def flip(images, mirrored):
        return torch.where(mirrored.to(images.device), images.flip(-1), images)

    return in_chunks(flip, images, torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5)


# --- RandAugment ----------------------------------------------------------------------------------

# RandAugment (Cubuk 2020): each image draws num_ops of these 14 operations, and for the signed ones
# a sign. The kernels are torchvision's own, except sharpen, which gives the same bits.
OPERATIONS = {  # name: (kernel(tv, image, strength), strength at magnitude 0 and at 30, signed)
    "Identity": (lambda tv, x, s: x, None, False),
    "ShearX": (lambda tv, x, s: shear(tv, x, s, 0.0), lambda H, W: (0, 0.3), True),
    "ShearY": (lambda tv, x, s: shear(tv, x, 0.0, s), lambda H, W: (0, 0.3), True),
    "TranslateX": (lambda tv, x, s: translate(tv, x, s, 0), lambda H, W: (0, 150 / 331 * W), True),
    "TranslateY": (lambda tv, x, s: translate(tv, x, 0, s), lambda H, W: (0, 150 / 331 * H), True),
    "Rotate": (lambda tv, x, s: tv.rotate(x, s), lambda H, W: (0, 30), True),
    "Brightness": (lambda tv, x, s: tv.adjust_brightness(x, 1 + s), lambda H, W: (0, 0.9), True),
    "Color": (lambda tv, x, s: tv.adjust_saturation(x, 1 + s), lambda H, W: (0, 0.9), True),
    "Contrast": (lambda tv, x, s: tv.adjust_contrast(x, 1 + s), lambda H, W: (0, 0.9), True),
    "Sharpness": (lambda tv, x, s: sharpen(x, 1 + s), lambda H, W: (0, 0.9), True),
    "Posterize": (lambda tv, x, s: tv.posterize(x, round(s)), lambda H, W: (8, 4), False),
    "Solarize": (lambda tv, x, s: tv.solarize(x, 255 * s), lambda H, W: (1, 0), False),
    "AutoContrast": (lambda tv, x, s: tv.autocontrast(x), None, False),
    "Equalize": (lambda tv, x, s: tv.equalize(x), None, False),
}
# The first kind moves pixels, the same whatever the image shows; for the second a new value depends
# on the old value alone. Both are applied by a table, made on the CPU: one call for all images, and
# the same pixels on every device.
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
MAPS = ("Brightness", "Posterize", "Solarize")


def shear(tv, x: Tensor, along_x: float, along_y: float) -> Tensor:
    degrees = [math.degrees(math.atan(along_x)), math.degrees(math.atan(along_y))]
    return tv.affine(x, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def translate(tv, x: Tensor, right: float, down: float) -> Tensor:
    pixels = [int(right), int(down)]
    return tv.affine(x, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])


def sharpen(images: Tensor, factor: float) -> Tensor:
    """torchvision's adjust_sharpness to the bit, without its convolution: 20 times faster on a CPU.

    Blurred is the mean over 3x3 with the centre counted five times, here by sums of integers; the
    border of one pixel stays as it is.
    """
    x = images.short()
    rows = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * x[..., 1:-1, 1:-1]
    out = images.float()
    centre = out[..., 1:-1, 1:-1]
    centre.add_(total.div(13).round_().sub_(centre), alpha=1 - factor)
    return out.clamp_(0, 255).to(torch.uint8)


def apply_operation(images: Tensor, name: str, magnitude: int, sign: int, fill=None) -> Tensor:
    """One operation at one magnitude (0..30) and sign (+1, -1) on uint8 (N, 3, H, W).

    fill: the colour of pixels from outside the image, three numbers in 0..255, or None for black.
    Equals torchvision's kernel, image by image, to the bit. Two kinds of operation need their
    kernel only once for all images: MOVES show what they do on an image of pixel numbers, MAPS on
    the 256 grey values.
    """
    from torchvision.transforms.v2 import functional as tv

    N, C, H, W = images.shape
    kernel, strengths, _ = OPERATIONS[name]
    strength = sign * torch.linspace(*strengths(H, W), 31)[magnitude].item() if strengths else 0.0
    if name in MOVES:
        numbers = torch.arange(1.0, H * W + 1).view(1, 1, H, W)  # from 1: 0 will mean "outside"
        source = kernel(tv, numbers, strength).flatten().long().to(images.device)
        outside = torch.tensor(fill or [0] * C).round().to(images).view(1, C, 1).expand(N, C, 1)
        pixels = torch.cat([outside, images.flatten(2)], dim=2)  # (N, C, 1 + H W)
        return pixels.gather(2, source.expand(N, C, -1)).view_as(images)
    if name in MAPS:
        table = kernel(tv, torch.arange(256, dtype=torch.uint8).view(1, 1, 256), strength).flatten()
        return table.to(images.device).index_select(0, images.flatten().int()).view_as(images)
    return kernel(tv, images, strength)


def rand_augment(
    images: Tensor,
    num_ops: int = 2,
    magnitude: int = 9,
    prob: float = 1.0,
    fill: tuple | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """RandAugment (Cubuk 2020) of uint8 (N, 3, H, W), with independent draws for every image.

    magnitude: 0..30, as in torchvision; prob: chance that a drawn operation is applied at all;
    fill: the colour (3 numbers, 0..255) of pixels from outside the image, None for black;
    generator: None for torch's global stream. (2, 9) is torchvision's default. timm's "rand-m9" is
    three times as strong and skips half: (2, 27, prob=0.5, fill=mean colour) is nearest to it.

    torchvision's class draws once per call, so that a batch would be all rotated or all solarized.
    Here the images that drew the same operation and sign are gathered, transformed by one call, and
    put back.
    """
    N, names = len(images), list(OPERATIONS)
    signed = torch.tensor([signed for _, _, signed in OPERATIONS.values()])
    operation = torch.randint(len(names), (N, num_ops), generator=generator)
    negative = torch.randint(2, (N, num_ops), generator=generator) * signed[operation]
    skipped = torch.rand(N, num_ops, generator=generator) >= prob
    # One number for each operation and sign; 0 is Identity.
    draws = (2 * operation + negative).masked_fill(skipped, 0)

    def transform(images, draws):
        out = images.clone()
        for slot in draws.unbind(1):
            counts = torch.bincount(slot, minlength=2 * len(names)).tolist()
            # sorted on the CPU: on MPS argsort was wrong beyond 256 (pytorch/pytorch#155560)
            groups = slot.argsort().to(out.device).split(counts)
            for draw, group in enumerate(groups):
                if draw >= 2 and len(group):
                    name, sign = names[draw // 2], -1 if draw % 2 else 1
                    chosen = out.index_select(0, group)
                    out[group] = apply_operation(chosen, name, magnitude, sign, fill)
        return out

    return in_chunks(transform, images, draws)


def augment(
    images: Tensor,
    crop: str,
    num_ops: int,
    magnitude: int,
    prob: float,
    fill: tuple | None,
    generator: Generator,
) -> Tensor:
    """The training augmentation of uint8 (N, 3, H, W): crop, flip, RandAugment, in DeiT's order.

    crop: "pad" (pad by 1/8 of the side, 4 pixels at 32, and cut), "resized" (80 to 100 % of the
    area) or "none".
    """
    if crop == "pad":
        images = random_crop(images, images.shape[-1] // 8, generator)
    elif crop == "resized":
        images = random_resized_crop(images, (0.8, 1.0), (3 / 4, 4 / 3), generator)
    images = random_flip(images, generator)
    return rand_augment(images, num_ops, magnitude, prob, fill, generator)


# --- mixing: normalised float32 images and soft targets -------------------------------------------


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """int64 (B,) -> float32 (B, K): 1 - smoothing on the label, plus smoothing / K everywhere.

    Label smoothing: Szegedy 2016, section 7.
    """
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def draw_lambda(alpha: float, generator: Generator) -> float:
    """A number from Beta(alpha, alpha): numpy draws it, as torch cannot from a generator."""
    seed = torch.randint(2**62, (), generator=generator).item()
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def mixup(
    images: Tensor, targets: Tensor, alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Blend every image with a neighbour, lambda to 1 - lambda, and the targets alike (Zhang 2018).

    images: float (B, 3, H, W); targets: (B, K) whose rows sum to 1. One lambda ~ Beta(alpha, alpha)
    a batch. The neighbour is the previous image of the batch: batches are shuffled, so it is a
    random one.
    """
    lam = draw_lambda(alpha, generator)
    return tuple(lam * x + (1 - lam) * x.roll(1, 0) for x in (images, targets))


def cutmix(
    images: Tensor, targets: Tensor, alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Paste the same box of every image's neighbour into it; mix the targets by area (Yun 2019).

    Shapes as in mixup. The box aims at 1 - lambda of the area; centred anywhere, it may stick out,
    so the share is taken from what was really pasted.
    """
    H, W = images.shape[-2:]
    half = math.sqrt(1 - draw_lambda(alpha, generator)) / 2
    y, x = (torch.randint(n, (), generator=generator).item() for n in (H, W))
    top, bottom = max(int(y - half * H), 0), min(int(y + half * H), H)
    left, right = max(int(x - half * W), 0), min(int(x + half * W), W)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right].roll(1, 0)
    pasted = (bottom - top) * (right - left) / (H * W)
    return mixed, (1 - pasted) * targets + pasted * targets.roll(1, 0)


def combine(
    images: Tensor, targets: Tensor, mixup_alpha: float, cutmix_alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Mix a batch by mixup or by cutmix, with equal chances. An alpha of 0 switches one off."""
    both = ((mixup, mixup_alpha), (cutmix, cutmix_alpha))
    on = [(mix, alpha) for mix, alpha in both if alpha > 0]
    if not on:
        return images, targets
    mix, alpha = on[torch.randint(len(on), (), generator=generator).item()]
    return mix(images, targets, alpha, generator)


# --- an epoch -------------------------------------------------------------------------------------


def epoch_seed(seed: int, epoch: int) -> int:
    """All randomness of an epoch follows from (seed, epoch): a resumed run needs no saved streams.

    Not from seed + epoch: run 1 would then repeat run 0, an epoch ahead. (Of several processes each
    has dropout masks of its own: train.py adds a multiple of the process's number.)
    """
    return seed * 1_000_003 + epoch


def epoch_batches(
    images: Tensor,
    labels: Tensor,
    mean: tuple,
    std: tuple,
    num_classes: int,
    config,
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches, (float32 (B, 3, H, W), targets (B, K)), from uint8 (N, 3, H, W).

    config: a recipe.TrainConfig. Every image is visited at most once; the incomplete last batch is
    left out, so that all shapes are equal.
    """
    generator = torch.Generator().manual_seed(epoch_seed(config.seed, epoch))

    # augment everything at once
    fill = tuple(255 * m for m in mean) if config.randaugment_fill == "mean" else None
    policy = (config.randaugment_ops, config.randaugment_magnitude, config.randaugment_prob, fill)
    images = augment(images, config.crop, *policy, generator)

    # whole batches, in a new order; not mixed in the last epochs
    order = torch.randperm(len(images), generator=generator).to(images.device)
    mean, std = (torch.tensor(x, device=images.device) for x in (mean, std))
    mixing = epoch <= round(config.mix_until * config.epochs)
    whole = len(order) // config.batch_size * config.batch_size
    for index in order[:whole].split(config.batch_size):
        x = data.normalize(images[index], mean, std)
        targets = soft_targets(labels[index], num_classes, config.label_smoothing)
        if mixing and torch.rand((), generator=generator) < config.mix_prob:
            x, targets = combine(x, targets, config.mixup, config.cutmix, generator)
        yield x, targets


def main(argv: list[str] | None = None):
    """Draw images through every augmentation, each with several draws, into one picture."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be of a package that is not here
    from matplotlib import rcdefaults
    from matplotlib.figure import Figure

    rcdefaults()  # the user's settings may ask for LaTeX

    parser = argparse.ArgumentParser(
        description=main.__doc__, usage=argparse.SUPPRESS, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset", default="shapes", help="cifar10, cifar100, folder or shapes (the default)")
    place = os.path.expanduser  # shells leave the ~ of --out=~/x to us
    add("--data-dir", type=place, default="data", help="where the dataset lies (default: data)")
    add("--image-size", type=int, default=32, help="pixels (default: 32)")
    add("--out", type=place, default="augmentation.png", help="a picture (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        dataset = data.load(args.dataset, args.data_dir, args.image_size)
    except (ValueError, OSError, RuntimeError, OverflowError) as error:  # or it is too large
        parser.error(" ".join(str(error).split()))

    # one image many times over, and a batch of different ones
    columns, generator = 6, torch.Generator().manual_seed(0)
    images, fill = dataset.train_images, tuple(255 * m for m in dataset.mean)
    one = images[(len(images) * 3 // 4 + 4) % len(images)].repeat(columns, 1, 1, 1)
    some = images[torch.randperm(len(images), generator=generator)[:columns]]
    rows = {
        "an image": one,
        "random_crop": random_crop(one, one.shape[-1] // 8, generator),
        "random_resized_crop": random_resized_crop(one, (0.8, 1.0), (3 / 4, 4 / 3), generator),
        "random_flip": random_flip(one, generator),
    }
    for name, (_, strengths, signed) in OPERATIONS.items():
        if strengths:
            magnitudes = torch.linspace(-30 if signed else 0, 30, columns).round().int().tolist()
            cells = [apply_operation(one[:1], name, abs(m), -1 if m < 0 else 1) for m in magnitudes]
            rows[f"{name}, {magnitudes[0]} to 30"] = torch.cat(cells)
    rows["rand_augment(2, 9)"] = rand_augment(one, 2, 9, generator=generator)
    rows["rand_augment(2, 27, 0.5)"] = rand_augment(one, 2, 27, 0.5, fill, generator)
    rows["a batch"] = some
    for name in ("AutoContrast", "Equalize"):
        rows[f"{name} of the batch"] = apply_operation(some, name, 30, 1)
    # a mix in which both images can be seen
    seed = 0
    while abs(draw_lambda(1.0, torch.Generator().manual_seed(seed)) - 0.6) > 0.02:
        seed += 1
    for mix in (mixup, cutmix):
        generator = torch.Generator().manual_seed(seed)
        mixed, targets = mix(some.float(), torch.eye(columns), 1.0, generator)  # a class an image
        rows[f"{mix.__name__}, {targets[0, 0]:.0%} and {targets[0, -1]:.0%}"] = mixed.byte()

    # two columns of rows
    half = math.ceil(len(rows) / 2)
    figure = Figure(figsize=(8.3, 0.51 * half + 0.4))
    bare = {"frame_on": False, "xticks": [], "yticks": []}
    margins = {"left": 0.16, "right": 0.99, "bottom": 0.01, "top": 0.94, "wspace": 0.55}
    axes = figure.subplots(half, 2, subplot_kw=bare, gridspec_kw=margins)
    for axis, (title, pixels) in zip(axes.T.flat, rows.items()):
        framed = F.pad(pixels, (1, 1, 1, 1), value=255)  # white between the images
        axis.imshow(torch.cat(framed.unbind(), 2).permute(1, 2, 0).numpy())
        axis.set_ylabel(title, fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle("What augmentation makes of an image, and of a batch", fontsize=10)
    kind = os.path.splitext(args.out)[1][1:] or "png"
    try:
        figure.savefig(args.out, dpi=90, format=kind)  # told no format, it may rename the file
    except (ValueError, OSError, RuntimeError) as error:  # a format that matplotlib cannot write
        parser.error(" ".join(str(error).split()))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
