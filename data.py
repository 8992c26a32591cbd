"""
Pixels: from files to uint8 tensors. Knows nothing of models, and nothing of augmentation.

    load        files              -> uint8 images (N, 3, H, W), int64 labels (N,), in parts:
                                      for training, for test, perhaps for validation
    split       labels (N,)        -> training and validation indices
    normalize   uint8 (B, 3, H, W) -> float32 (B, 3, H, W)

There are no worker processes. All of CIFAR-10 is 184 MB of uint8: it is decoded once, moved to the
device once, and augmented there with a few hundred large operations an epoch instead of a dozen
small ones an image.

Axes:  N images (tokens in vit.py)   B batch   C = 3 channels   H, W image height and width
       K classes
"""

import contextlib
import hashlib
import os
import socket
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pictures import load_folder

# torchvision is imported where it is used: it is slow to import, and --help need not wait.

# --- datasets: files -> uint8 tensors -------------------------------------------------------------

CIFAR_STATISTICS = {  # mean, standard deviation of the training pixels, per channel, in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass
class Dataset:
    """Labelled images in memory, in two or three disjoint parts."""

    classes: list[str]  # K names; a label is an index into them
    train_images: Tensor  # (N, 3, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, float, float]  # of the training images, per channel, in [0, 1]
    std: tuple[float, float, float]
    val_images: Tensor | None = None  # of a folder that brings a validation part of its own
    val_labels: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training images and labels, in order (the split is by position), and of
        the validation part that a folder brings."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.val_images, self.val_labels):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def load(
    dataset: str,
    data_dir: str,
    image_size: int,
    download_url: str | None = None,
    only_test: bool = False,
) -> Dataset:
    """Read "cifar10", "cifar100" (32x32 only), a "folder" of pictures, or draw "shapes".

    download_url is a mirror of CIFAR's tarball; its md5 is checked wherever it comes from. With
    only_test the training part comes back empty (and, but for CIFAR, a mean of 0 and a deviation of
    1), and a folder needs no train/; but where a folder's test is set aside from its training
    pictures, they come back too. Raises ValueError or OSError with a one-line message.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if dataset in CIFAR_STATISTICS:
        if image_size != 32:
            raise ValueError(f"{dataset} has images of 32x32 pixels, image_size is {image_size}")
        classes, parts = load_cifar(dataset, data_dir, download_url)
        if only_test:
            del parts["train"]
    elif dataset == "folder":
        classes, parts = load_folder(data_dir, image_size, only_test)
    elif dataset == "shapes":
        classes, parts = list(SHAPES), {"test": draw_shapes(2_000, image_size, seed=1)}
        if not only_test:
            parts["train"] = draw_shapes(10_000, image_size, seed=0)
    else:
        known = '"cifar10", "cifar100", "folder" or "shapes"'
        raise ValueError(f'dataset must be {known}, got "{dataset}"')

    nothing = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    parts.setdefault("train", (nothing, torch.empty(0, dtype=torch.int64)))
    mean, std = CIFAR_STATISTICS.get(dataset) or channel_statistics(parts["train"][0])
    return Dataset(classes, *parts["train"], *parts["test"], mean, std, *parts.get("val", ()))


def load_cifar(dataset: str, data_dir: str, download_url: str | None = None) -> tuple:
    """(classes, {"train": (images, labels), "test": (images, labels)}) of CIFAR, by torchvision."""
    from torchvision import datasets

    official = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]

    class Source(official):  # torchvision takes the address from the class
        url = download_url or official.url

    is_new = not os.path.exists(data_dir)
    try:
        os.makedirs(data_dir, exist_ok=True)
        with one_at_a_time(data_dir), patience(60):
            # download=True also unpacks a tarball that is there, without touching the network
            train, test = (Source(data_dir, train=train, download=True) for train in (True, False))
    except Exception as error:  # network, server and md5 check each raise types of their own
        if is_new and os.path.isdir(data_dir) and not os.listdir(data_dir):
            os.rmdir(data_dir)  # nothing came: leave no trace
        raise OSError(
            f"cannot get {dataset} ({error}). Put a whole {official.filename} (md5 "
            f"{official.tgz_md5}, no other is taken) into {data_dir}/, or name a mirror with "
            f"--download-url, or see everything run without it: --preset demo"
        ) from None
    parts = {}
    for name, part in (("train", train), ("test", test)):
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        parts[name] = images.contiguous(), torch.tensor(part.targets)
    return train.classes, parts


@contextlib.contextmanager
def one_at_a_time(folder: str):
    """Runs that were started together wait here for the one that downloads and unpacks.

    Where there are no such locks (Windows, some network drives) they do not wait.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def patience(seconds: float):
    """A server that sends nothing for so long is an OSError: urllib would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- drawings -------------------------------------------------------------------------------------

SHAPES = {  # class: where its five dots are, on a grid of 3x3
    "plus": (".o.", "ooo", ".o."),
    "cross": ("o.o", ".o.", "o.o"),
    "T": ("ooo", ".o.", ".o."),
    "anchor": (".o.", ".o.", "ooo"),
    "L": ("o..", "o..", "ooo"),
    "seven": ("ooo", "..o", "..o"),
    "V": ("o.o", "o.o", ".o."),
    "roof": (".o.", "o.o", "o.o"),
    "zigzag": ("oo.", ".o.", ".oo"),
    "stairs": ("o..", "oo.", ".oo"),
}


def draw_shapes(n: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """n drawings of the ten SHAPES, in turn: uint8 (n, 3, H, W) and int64 labels (n,).

    Each has five identical dots. Only their arrangement tells the class, not their colour nor any
    single pixel; a ViT without positions gets half of the drawings right. Drawn at random are the
    colours, whether the dots are lighter or darker than the paper, their size, a small shift of
    each and a larger one of all, some noise, and whether all is mirrored: a mirrored picture is of
    the same class. The same seed draws the same bytes (on CPUs with the same instructions).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    # All lengths are for 32x32 pixels. Dots are 8 apart, as are the patches of the demo: whatever
    # their arrangement, they are cut in the same way, and a patch alone tells little.
    grid = [(row, column) for row in (-8.0, 0.0, 8.0) for column in (-8.0, 0.0, 8.0)]
    centres = torch.tensor(
        [[at for at, mark in zip(grid, "".join(rows)) if mark == "o"] for rows in SHAPES.values()]
    )  # (K, 5, 2): down and right of the middle
    S = 2 * image_size  # drawn at twice the size: smooth edges
    axis = (torch.arange(S) + 0.5) / S * 32 - 16
    chunks, labels = [], torch.arange(n) % len(SHAPES)
    for part in labels.split(max(1, min(1_000, 2**20 // image_size**2))):  # to bound the memory
        m = len(part)
        places = centres[part] + uniform(-1, 1, m, 5, 2) + uniform(-3, 3, m, 1, 2)
        mirrored = torch.rand(m, generator=generator) < 0.5
        places[mirrored, :, 1] *= -1
        y, x = places[..., None, None].unbind(2)  # (m, 5, 1, 1)
        radius = uniform(2.4, 2.8, m, 1, 1, 1)
        dots = (axis[:, None] - y) ** 2 + (axis - x) ** 2 < radius**2  # (m, 5, S, S)
        share = F.avg_pool2d(dots.any(1, keepdim=True).float(), 2)  # (m, 1, H, W): of a pixel
        dark = uniform(100, 140, m, 3, 1, 1)
        light = dark + uniform(80, 110, m, 3, 1, 1)
        is_dark = torch.rand(m, 1, 1, 1, generator=generator) < 0.5  # the paper
        paper, ink = torch.where(is_dark, dark, light), torch.where(is_dark, light, dark)
        noise = 3 * torch.randn(m, 3, image_size, image_size, generator=generator)
        chunks.append((paper + share * (ink - paper) + noise).clamp(0, 255).to(torch.uint8))
    return torch.cat(chunks), labels


def channel_statistics(images: Tensor) -> tuple[tuple, tuple]:
    """Mean and standard deviation of the pixels of uint8 (N, 3, H, W), per channel, in [0, 1].

    Of all pixels together. (The std 0.2023, 0.1994, 0.2010 often pasted for CIFAR-10 is the mean of
    each image's own.) A channel of one value has the deviation 1: it is normalised to 0, and not to
    0 / 0. Without images: 0 and 1, which leave pixels as they are.
    """
    levels, mean, std = torch.arange(256, dtype=torch.float64) / 255, [], []
    for c in range(3):
        counts = torch.zeros(256, dtype=torch.int64)
        for part in images.split(1_000):  # a copy of a thousand images, and not of all
            counts += part[:, c].flatten().bincount(minlength=256)
        share = counts.double() / counts.sum().clamp(min=1)
        mean.append((share * levels).sum().item())
        std.append((share * (levels - mean[-1]) ** 2).sum().sqrt().item() or 1.0)
    return tuple(mean), tuple(std)


def split(labels: Tensor, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation images: disjoint, complete, shuffled by seed.

    Stratified: every class gives its share of the val_size images, to within one image. But a class
    of two images or more keeps one for training, and the only image of a class goes last: where
    that is not enough (more than half are asked for, or most classes have one image), the others
    give more. ValueError for a val_size that cannot be met.
    """
    n, sizes = len(labels), labels.bincount()
    limit = min(n - 1, n - int((sizes > 1).sum()))
    if not 1 <= val_size <= limit:
        raise ValueError(
            f"val_size must be between 1 and {limit} for {n} training images of "
            f"{int((sizes > 0).sum())} classes, got {val_size}"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # The class that is furthest below its share gives the next image: the j-th image of a class
    # stands at j minus that share.
    place = torch.empty(n, dtype=torch.float64)
    for label in labels.unique():
        mine = order[labels[order] == label]
        m = len(mine)
        place[mine] = torch.arange(m, dtype=torch.float64) - m * val_size / n
        place[mine[-1]] = n if m == 1 else 2 * n  # an only one goes last, the last of several never
    is_val = torch.zeros(n, dtype=torch.bool)
    is_val[order[place[order].argsort(stable=True)[:val_size]]] = True
    return order[~is_val[order]], order[is_val[order]]


def hold_out(dataset: Dataset, val_size: int, seed: int) -> tuple[tuple, tuple]:
    """(images, labels) to train on, and to validate on: the dataset's own, or split off.

    Both come shuffled: a folder is read class by class, and train.py takes a quick look at the
    first images of either.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if dataset.val_images is None:
        return tuple((images[index], labels[index]) for index in split(labels, val_size, seed))
    generator = torch.Generator().manual_seed(seed)

    def shuffled(images, labels):
        index = torch.randperm(len(labels), generator=generator)
        return images[index], labels[index]

    return shuffled(images, labels), shuffled(dataset.val_images, dataset.val_labels)


def normalize(images: Tensor, mean: tuple | Tensor, std: tuple | Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32: (x / 255 - mean) / std in every channel.

    mean and std as tensors on the device save a copy to it, for which the CPU would wait.
    ValueError for pixels that are no uint8: in [0, 1] they would all look black.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 pixels, 0 to 255, got {images.dtype}")
    mean, std = (torch.as_tensor(x, device=images.device).view(-1, 1, 1) for x in (mean, std))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)
