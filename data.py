"""
Pixels: from files to the batches a model trains on. Knows nothing of models.

    load           files              -> uint8 images (N, 3, H, W), int64 labels (N,), twice:
                                         for training and for test
    split          the numbers 0..N-1 -> training and validation indices
    augment        uint8 (N, 3, H, W) -> uint8 (N, 3, H, W): crop, flip, RandAugment,
                                         a whole epoch in one call
    train_batches  an epoch           -> batches: float32 (B, 3, H, W), soft targets (B, K)

There are no worker processes. All of CIFAR-10 is 184 MB of uint8: it is decoded once, moved to the
device once, and augmented there with a few hundred large operations an epoch instead of a dozen
small ones an image.

Every random function draws from the CPU torch.Generator it is given and from nothing else, so one
seed gives one batch, on every device. No function writes into its input.

Axes:  N images (tokens in vit.py)   B batch   C = 3 channels   H, W image height and width
       K classes

`python data.py` draws what all this does to an image.
"""

import hashlib
import math
import os
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as nnF
from torch import Generator, Tensor
from torch.utils.data import DataLoader, TensorDataset

# torchvision and PIL are imported where they are used: they are slow to import, and --help need
# not wait.

# --- datasets: files -> uint8 tensors -------------------------------------------------------------

CIFAR_STATISTICS = {  # mean, standard deviation of the training pixels, per channel, in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass
class Dataset:
    """Labelled images in memory, in two parts that never meet."""

    classes: list[str]  # K names; a label is an index into them
    train_images: Tensor  # (N, 3, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, float, float]  # of the training images, per channel, in [0, 1]
    std: tuple[float, float, float]
    val_images: Tensor | None = None
    val_labels: Tensor | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the training images, their labels and their order: the split depends on all three."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def load(dataset: str, data_dir: str, image_size: int, download_url: str | None = None, only_test=False) -> Dataset:
    """Read "cifar10", "cifar100" (32x32 only), a "folder" of pictures, or draw "shapes".

    A folder holds data_dir/train/<class>/* and data_dir/test/<class>/*. download_url is a mirror of
    CIFAR's tarball; its md5 is checked wherever it comes from. Raises ValueError or OSError with a
    one-line message.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if dataset in CIFAR_STATISTICS:
        if image_size != 32:
            raise ValueError(f"{dataset} has images of 32x32 pixels, image_size is {image_size}")
        classes, *arrays = load_cifar(dataset, data_dir, download_url)
        return Dataset(classes, *arrays, *CIFAR_STATISTICS[dataset])
    if dataset == "folder":
        classes, *arrays = load_folder(data_dir, image_size)
    elif dataset == "shapes":
        classes = list(SHAPES)
        arrays = [*draw_shapes(10_000, image_size, seed=0), *draw_shapes(2_000, image_size, seed=1)]
    else:
        known = '"cifar10", "cifar100", "folder" or "shapes"'
        raise ValueError(f'dataset must be {known}, got "{dataset}"')
    mean, std = channel_statistics(arrays[0])
    std = tuple(s or 1.0 for s in std)  # a channel of one value becomes 0, and not 0 / 0
    return Dataset(classes, *arrays, mean, std)


def load_cifar(dataset: str, data_dir: str, download_url: str | None = None) -> tuple:
    """(classes, train images, train labels, test images, test labels) of CIFAR, by torchvision."""
    from torchvision import datasets

    official = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    source = type(official.__name__, (official,), {"url": download_url or official.url})
    is_new = not os.path.exists(data_dir)
    try:  # download=True also unpacks a tarball that is already there, without touching the network
        train, test = (source(data_dir, train=train, download=True) for train in (True, False))
    except Exception as error:  # network, server and md5 check each raise types of their own
        if is_new and os.path.isdir(data_dir) and not os.listdir(data_dir):
            os.rmdir(data_dir)  # nothing came: leave no trace
        raise OSError(
            f"cannot get {dataset} ({error}). Put {official.filename} (md5 {official.tgz_md5}) "
            f"into {data_dir}/, or name a mirror with --download-url, or see everything run "
            f"without it: --preset demo"
        ) from None
    arrays = []
    for part in (train, test):
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        arrays += [images.contiguous(), torch.tensor(part.targets)]
    return train.classes, *arrays


def load_folder(data_dir: str, image_size: int) -> tuple:
    """(classes, train images, train labels, test images, test labels) of a folder of pictures.

    Decoding happens once. The result is cached beside the pictures and made anew when a file's
    name, size or time of change differs.
    """
    from tqdm import tqdm

    classes, train_files = list_images(os.path.join(data_dir, "train"))
    test_classes, test_files = list_images(os.path.join(data_dir, "test"))
    if classes != test_classes:
        different = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise ValueError(
            f"{data_dir}: train and test must have the same classes; "
            f"in only one of them: {different}"
        )

    files = train_files + test_files
    stats = [(path, label, os.stat(path)) for path, label in files]
    stamps = [  # relative names, so that the folder may be moved
        (os.path.relpath(path, data_dir), label, stat.st_size, stat.st_mtime_ns)
        for path, label, stat in stats
    ]
    key = hashlib.sha256(repr((classes, stamps)).encode()).hexdigest()
    cache = os.path.join(data_dir, f".cache-{image_size}.pt")
    try:
        cached = torch.load(cache, weights_only=True)
        if cached["key"] == key:
            return classes, *cached["arrays"]
    except Exception:  # absent, damaged, of an older format: whatever it is, decoding puts it right
        pass

    print(f"decoding {len(files):,} images of {data_dir}, once", flush=True)
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    with tqdm(files, unit=" images", disable=None) as bar:  # None: a bar on a terminal only
        for i, (path, _) in enumerate(bar):
            images[i] = open_image(path, image_size)
    labels = torch.tensor([label for _, label in files])
    n = len(train_files)
    arrays = [images[:n], labels[:n], images[n:], labels[n:]]
    try:
        save_atomically({"key": key, "arrays": arrays}, cache)
    except OSError as error:  # a read-only folder: everything works, only slower the next time
        print(f"warning: cannot keep the decoded images for the next run: {error}", file=sys.stderr)
    return classes, *arrays


def list_images(root: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names, sorted, and (path, label) of every picture in root/<class>/.

    Hidden files and folders are skipped. FileNotFoundError for what is missing or empty.
    """
    from torchvision.datasets import folder

    def visible(path):
        hidden = any(part.startswith(".") for part in os.path.relpath(path, root).split(os.sep))
        return not hidden and folder.is_image_file(path)

    expected = f"expected {root}/<class>/ with pictures in it"
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}: {expected}")
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    classes = sorted(name for name in folders if not name.startswith("."))
    "".join(classes).encode()  # a ValueError for a name that is no text and could not be printed
    if not classes:
        raise FileNotFoundError(f"no class folders in {root}: {expected}")
    numbers = {name: i for i, name in enumerate(classes)}
    files = folder.make_dataset(root, numbers, is_valid_file=visible, allow_empty=True)
    empty = set(range(len(classes))) - {label for _, label in files}
    if empty:
        raise FileNotFoundError(f"no pictures in {os.path.join(root, classes[min(empty)])}")
    return classes, files


def open_image(path: str, image_size: int) -> Tensor:
    """A picture of any size and format as uint8 (3, image_size, image_size).

    Scaled, then cropped to the centre square. ValueError, with the path, for a file that is not a
    whole picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # upright, as the camera was held
            if image.mode.startswith("I;16"):  # 16 bits of grey, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):  # 32 bits or floats: nobody knows what its white is
                raise ValueError(f"pixels of mode {image.mode} are not supported")
            if "transparency" in image.info:
                image = image.convert("RGBA")  # else PIL warns about a transparent palette
            image = image.convert("RGB")
    except Exception as error:  # PIL raises half a dozen types for broken files
        raise ValueError(f"cannot read the image {path}: {error}") from None
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save_atomically(obj, path: str, write=torch.save):
    """write(obj, file), so that path holds the old file or the whole new one, whatever happens.

    Written beside the target, flushed to the disk, then moved into place. A kill or an OSError
    leaves the old file as it was.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:  # torch.save(path) would hide why it failed
            write(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_text(text: str, file):
    """For save_atomically, in place of torch.save."""
    file.write(text.encode())


SHAPES = {  # class: which points belong to it, at u (right), v (down) and radius r
    "disk": lambda u, v, r: r < 0.95,
    "ring": lambda u, v, r: (0.6 < r) & (r < 1),
    "square": lambda u, v, r: torch.maximum(u.abs(), v.abs()) < 0.8,
    "frame": lambda u, v, r: (torch.maximum(u.abs(), v.abs()) - 0.7).abs() < 0.18,
    "triangle": lambda u, v, r: (v < 0.7) & (2 * u.abs() < v + 1),
    "diamond": lambda u, v, r: u.abs() + v.abs() < 1.1,
    "plus": lambda u, v, r: (
        (torch.minimum(u.abs(), v.abs()) < 0.25) & (torch.maximum(u.abs(), v.abs()) < 1)
    ),
    "cross": lambda u, v, r: ((u.abs() - v.abs()).abs() < 0.35) & (r < 1.1),
    "crescent": lambda u, v, r: (r < 1) & ((u - 0.5) ** 2 + v**2 > 0.6),
    "bars": lambda u, v, r: (u.abs() < 0.9) & ((v.abs() - 0.55).abs() < 0.25),
}


def draw_shapes(n: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """n drawings of the ten SHAPES, in turn: uint8 (n, 3, H, W) and int64 labels (n,).

    Colours, place, size and tilt are random and independent of the class, so that neither the mean
    colour nor any single pixel gives the class away: the shape has to be seen. The same seed draws
    the same bytes (on CPUs with the same instructions).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    S = 2 * image_size  # drawn at twice the size: smooth edges
    chunks, labels = [], torch.arange(n) % len(SHAPES)
    axis = (torch.arange(S) + 0.5) / S * 2 - 1
    for part in labels.split(1_000):
        m = len(part)
        x, y = uniform(-0.35, 0.35, 2, m, 1, 1)
        size, tilt = uniform(0.4, 0.65, m, 1, 1), uniform(-0.3, 0.3, m, 1, 1)
        dx, dy = (axis.view(1, 1, S) - x) / size, (axis.view(1, S, 1) - y) / size
        u, v = dx * tilt.cos() - dy * tilt.sin(), dx * tilt.sin() + dy * tilt.cos()  # (m, S, S)
        inside = torch.empty(m, 1, S, S)
        for label, shape in enumerate(SHAPES.values()):
            mine = part == label
            inside[mine, 0] = shape(u[mine], v[mine], (u[mine] ** 2 + v[mine] ** 2).sqrt()).float()
        inside = nnF.avg_pool2d(inside, 2)  # (m, 1, H, W): share of the pixel that is inside
        paper = uniform(0, 120, m, 3, 1, 1)
        ink = paper + uniform(60, 135, m, 3, 1, 1)  # lighter than its paper, in every channel
        noise = 10 * torch.randn(m, 3, image_size, image_size, generator=generator)
        chunks.append((paper + inside * (ink - paper) + noise).clamp(0, 255).to(torch.uint8))
    return torch.cat(chunks), labels


def channel_statistics(images: Tensor) -> tuple[tuple, tuple]:
    """Mean and standard deviation of the pixels of uint8 (N, 3, H, W), per channel, in [0, 1].

    Of all pixels together. (The std 0.2023, 0.1994, 0.2010 often pasted for CIFAR-10 is the mean of
    each image's own.)
    """
    levels, mean, std = torch.arange(256, dtype=torch.float64) / 255, [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append((share * levels).sum().item())
        std.append((share * (levels - mean[-1]) ** 2).sum().sqrt().item())
    return tuple(mean), tuple(std)


def split(labels, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation images: disjoint, complete, shuffled by seed.

    ValueError unless 1 <= val_size < n.
    """
    n = len(labels)
    if not 1 <= val_size < n:
        limits = f"between 1 and {n - 1} for {n} training images"
        raise ValueError(f"val_size must be {limits}, got {val_size}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[val_size:], order[:val_size]


# --- augmentation: uint8 (N, 3, H, W) -> uint8 (N, 3, H, W), every image with draws of its own ----


# Values of pixels that one call handles: these stay in a CPU's cache; an accelerator likes few and
# large calls, and all of CIFAR-10 is one.
CHUNK_ON_CPU, CHUNK_ON_ACCELERATOR = 2**24, 2**28


def in_chunks(transform, images: Tensor, draws: Tensor) -> Tensor:
    """transform(images, draws), a few thousand images at a time. draws: (N, ...), one an image."""
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
        padded = nnF.pad(images, (padding,) * 4)
        # A view of all windows at once, in which nothing is copied: (N, C, 2p+1, 2p+1, H, W).
        windows = padded.unfold(2, H, 1).unfold(3, W, 1)
        return windows[torch.arange(N, device=images.device), :, y, x]  # (N, C, H, W)

    offsets = torch.randint(2 * padding + 1, (len(images), 2), generator=generator)
    return in_chunks(cut, images, offsets)


def random_resized_crop(images: Tensor, scale: tuple, ratio: tuple, generator: Generator) -> Tensor:
    """uint8 (N, C, H, W) -> the same: a window of random area and aspect, resized bilinearly.

    scale: limits of the window's area as a fraction of the image's; ratio: of its width / height.
    The crop of GoogLeNet (Szegedy 2015) as torchvision's RandomResizedCrop draws it: ten tries,
    then the whole image.
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
    return nnF.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """uint8 (N, C, H, W) -> the same: each image mirrored left to right with probability 1/2."""

    def flip(images, mirrored):
        return torch.where(mirrored.to(images.device), images.flip(-1), images)

    return in_chunks(flip, images, torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5)


# RandAugment (Cubuk 2020): each image draws num_ops of these 14 operations, and for the signed ones
# a sign. The kernels are torchvision's own, but for sharpen, which equals its.
OPERATIONS = {  # name: (kernel(F, image, strength), strength at magnitude 0 and at 30, signed)
    "Identity": (lambda F, x, m: x, None, False),
    "ShearX": (lambda F, x, m: shear(F, x, m, 0.0), lambda H, W: (0, 0.3), True),
    "ShearY": (lambda F, x, m: shear(F, x, 0.0, m), lambda H, W: (0, 0.3), True),
    "TranslateX": (lambda F, x, m: translate(F, x, m, 0), lambda H, W: (0, 150 / 331 * W), True),
    "TranslateY": (lambda F, x, m: translate(F, x, 0, m), lambda H, W: (0, 150 / 331 * H), True),
    "Rotate": (lambda F, x, m: F.rotate(x, m), lambda H, W: (0, 30), True),
    "Brightness": (lambda F, x, m: F.adjust_brightness(x, 1 + m), lambda H, W: (0, 0.9), True),
    "Color": (lambda F, x, m: F.adjust_saturation(x, 1 + m), lambda H, W: (0, 0.9), True),
    "Contrast": (lambda F, x, m: F.adjust_contrast(x, 1 + m), lambda H, W: (0, 0.9), True),
    "Sharpness": (lambda F, x, m: sharpen(x, 1 + m), lambda H, W: (0, 0.9), True),
    "Posterize": (lambda F, x, m: F.posterize(x, round(m)), lambda H, W: (8, 4), False),
    "Solarize": (lambda F, x, m: F.solarize(x, 255 * m), lambda H, W: (1, 0), False),
    "AutoContrast": (lambda F, x, m: F.autocontrast(x), None, False),
    "Equalize": (lambda F, x, m: F.equalize(x), None, False),
}
# The first kind moves pixels, the same whatever the image shows; for the second a new value depends
# on the old value alone. Both are applied by a table, made on the CPU: one call for all images, and
# the same pixels on every device.
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
MAPS = ("Brightness", "Posterize", "Solarize")


def shear(F, x: Tensor, along_x: float, along_y: float) -> Tensor:
    degrees = [math.degrees(math.atan(along_x)), math.degrees(math.atan(along_y))]
    return F.affine(x, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def translate(F, x: Tensor, right: float, down: float) -> Tensor:
    pixels = [int(right), int(down)]
    return F.affine(x, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])


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

    fill: the colour of what comes in from outside, three numbers in 0..255, or None for black.
    Equals torchvision's kernel, image by image, to the bit. Two kinds of operation need their
    kernel only once for all images: MOVES show what they do on an image of pixel numbers, MAPS on
    the 256 grey values.
    """
    from torchvision.transforms.v2 import functional as F

    N, C, H, W = images.shape
    kernel, strengths, _ = OPERATIONS[name]
    strength = sign * torch.linspace(*strengths(H, W), 31)[magnitude].item() if strengths else 0.0
    if name in MOVES:
        numbers = torch.arange(1.0, H * W + 1).view(1, 1, H, W)  # from 1: 0 will mean "outside"
        source = kernel(F, numbers, strength).flatten().long().to(images.device)
        outside = torch.tensor(fill or [0] * C).round().to(images).view(1, C, 1).expand(N, C, 1)
        pixels = torch.cat([outside, images.flatten(2)], dim=2)  # (N, C, 1 + H W)
        return pixels.gather(2, source.expand(N, C, -1)).view_as(images)
    if name in MAPS:
        table = kernel(F, torch.arange(256, dtype=torch.uint8).view(1, 1, 256), strength).flatten()
        return table.to(images.device).index_select(0, images.flatten().int()).view_as(images)
    return kernel(F, images, strength)


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
    fill: the colour (3 numbers, 0..255) of what comes in from outside, None for black. (2, 9) is
    torchvision's default. timm's "rand-m9" is three times as strong and skips half: (2, 27,
    prob=0.5, fill=mean colour) is nearest to it.

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
            groups = slot.to(out.device).argsort().split(counts)
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


# --- batches: uint8 images and labels -> normalised float32 images and soft targets ---------------


def normalize(images: Tensor, mean: tuple | Tensor, std: tuple | Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32: (x / 255 - mean) / std in every channel.

    mean and std as tensors on the device save a copy to it, for which the CPU would wait.
    """
    mean, std = (torch.as_tensor(x, device=images.device).view(-1, 1, 1) for x in (mean, std))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """int64 (B,) -> float32 (B, K): 1 - smoothing on the label, plus smoothing / K everywhere.

    Label smoothing: Szegedy 2016, section 7.
    """
    return nnF.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


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
    share = draw_lambda(alpha, generator)
    return tuple(share * x + (1 - share) * x.roll(1, 0) for x in (images, targets))


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
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
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


def train_batches(
    images: Tensor, labels: Tensor, batch_size: int, collate, generator: Generator
) -> DataLoader:
    """One epoch of shuffled batches, made by collate(uint8 (B, 3, H, W), int64 (B,)).

    Every image is visited at most once; the incomplete last batch is dropped, so that all shapes
    are equal. The epoch is shuffled in one call, so the sampler yields whole batches, as slices
    that cost nothing to fetch.
    """
    order = torch.randperm(len(images), generator=generator).to(images.device)
    dataset = TensorDataset(images.index_select(0, order), labels[order])
    batches = [slice(i, i + batch_size) for i in range(0, len(images) - batch_size + 1, batch_size)]
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        collate_fn=lambda batch: collate(*batch),
        generator=generator,  # else the loader would draw a seed from the global stream
    )


def main(argv: list[str] | None = None):
    """Draw images through every augmentation, each with several draws, into one picture."""
    import argparse

    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--dataset", default="shapes", help="cifar10, cifar100, folder or shapes (the default)")
    add("--data-dir", default="data", help="where the dataset lies (default: data)")
    add("--image-size", type=int, default=32, help="pixels (default: 32)")
    add("--out", default="augmentation.png", help="the picture to write (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        dataset = load(args.dataset, args.data_dir, args.image_size)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")

    columns, generator = 8, torch.Generator().manual_seed(0)
    images = dataset.train_images
    one = images[len(images) * 3 // 4].repeat(columns, 1, 1, 1)
    some = images[torch.randperm(len(images), generator=generator)[:columns]]
    fill = tuple(255 * m for m in dataset.mean)
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
    rows["rand_augment(2, 27, 0.5, mean)"] = rand_augment(one, 2, 27, 0.5, fill, generator)
    rows["a batch"] = some
    for name in ("AutoContrast", "Equalize"):
        rows[f"{name} of the batch"] = apply_operation(some, name, 30, 1)
    for mix in (mixup, cutmix):
        mixed, _ = mix(some.float(), torch.zeros(columns, 1), 1.0, generator)
        rows[f"{mix.__name__} of the batch"] = mixed.to(torch.uint8)

    size = (0.9 * columns + 2.6, 0.9 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, layout="constrained")
    for line, (title, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.axis("off")
        line[0].text(-0.15, 0.5, title, ha="right", va="center", transform=line[0].transAxes)
    figure.suptitle("What augmentation makes of an image, and of a batch")
    try:
        figure.savefig(args.out, dpi=75)
    except (ValueError, OSError) as error:  # ValueError: a format that matplotlib does not know
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

def is_picture(p): return p.endswith(('.png','.jpg'))
