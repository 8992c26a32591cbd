"""
Pixels: from files to uint8 tensors. Knows nothing of models, and nothing of augmentation.

    load        files              -> uint8 images (N, 3, H, W), int64 labels (N,), twice:
                                      for training and for test
    open_image  a file of any kind -> uint8 (3, H, W)
    split       labels (N,)        -> training and validation indices
    normalize   uint8 (B, 3, H, W) -> float32 (B, 3, H, W)

There are no worker processes. All of CIFAR-10 is 184 MB of uint8: it is decoded once, moved to the
device once, and augmented there with a few hundred large operations an epoch instead of a dozen
small ones an image.

Axes:  N images (tokens in vit.py)   B batch   C = 3 channels   H, W image height and width
       K classes
"""

import hashlib
import itertools
import os
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
    val_images: Tensor | None = None  # of a folder that brings a validation part of its own
    val_labels: Tensor | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the training images, their labels and their order: the split depends on all three."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels):
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
    only_test the training part comes back empty, and a folder needs no train/. Raises ValueError
    or OSError with a one-line message.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if dataset in CIFAR_STATISTICS:
        if image_size != 32:
            raise ValueError(f"{dataset} has images of 32x32 pixels, image_size is {image_size}")
        classes, parts = load_cifar(dataset, data_dir, download_url)
    elif dataset == "folder":
        classes, parts = load_folder(data_dir, image_size, only_test)
    elif dataset == "shapes":
        classes, parts = list(SHAPES), {"test": draw_shapes(2_000, image_size, seed=1)}
        if not only_test:
            parts["train"] = draw_shapes(10_000, image_size, seed=0)
    else:
        known = '"cifar10", "cifar100", "folder" or "shapes"'
        raise ValueError(f'dataset must be {known}, got "{dataset}"')

    if only_test:
        nothing = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
        parts["train"] = nothing, torch.empty(0, dtype=torch.int64)
    if dataset in CIFAR_STATISTICS:
        mean, std = CIFAR_STATISTICS[dataset]
    else:
        mean, std = channel_statistics(parts["train"][0])
    val = parts.get("val", (None, None))
    return Dataset(classes, *parts["train"], *parts["test"], mean, std, *val)


def load_cifar(dataset: str, data_dir: str, download_url: str | None = None) -> tuple:
    """(classes, {"train": (images, labels), "test": (images, labels)}) of CIFAR, by torchvision."""
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
    parts = {}
    for name, part in (("train", train), ("test", test)):
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        parts[name] = images.contiguous(), torch.tensor(part.targets)
    return train.classes, parts


# --- folders of pictures --------------------------------------------------------------------------

VAL_NAMES = ("val", "valid", "validation")
EXPECTED = (
    "expected <data-dir>/<class>/* with two classes or more, "
    "or <data-dir>/train/<class>/* and <data-dir>/test/<class>/*"
)


def load_folder(data_dir: str, image_size: int, only_test: bool = False) -> tuple:
    """(classes, {"train": (images, labels), "test": ..., perhaps "val": ...}) of own pictures.

    They lie in data_dir/<class>/, or in data_dir/train/<class>/ and data_dir/test/<class>/, perhaps
    with data_dir/val/<class>/. Where there is no test/, a fifth of every class is set aside for it.
    """
    if not os.path.isdir(data_dir):
        raise FileNotFoundError(f"no folder {data_dir}: {EXPECTED}")
    folders = {os.path.basename(path).lower(): path for path in contents(data_dir)[0]}
    parts = {name: folders[name] for name in ("train", "test", *VAL_NAMES) if name in folders}
    # A class may be called "train", as in cars, ships and trains: it has no folders in it.
    if len(parts) < len(folders) and not any(contents(path)[0] for path in parts.values()):
        parts = {}
    vals = [name for name in VAL_NAMES if name in parts]
    if len(vals) > 1:
        raise ValueError(f"{data_dir} has {' and '.join(vals)}: keep one of them")

    passed_over = Counter()  # ending -> number of files
    files = {}  # part -> class -> paths
    if only_test and "test" in parts:
        files["test"] = list_images(parts["test"], passed_over)
    else:
        default = os.path.join(data_dir, "train") if parts else data_dir
        files["train"] = list_images(parts.get("train", default), passed_over)
        if "test" in parts:
            files["test"] = list_images(parts["test"], passed_over)
        else:
            files["train"], files["test"] = set_aside(files["train"], data_dir)
        for name in vals:
            files["val"] = list_images(parts[name], passed_over)
    if passed_over:
        counts = ", ".join(f"{n:,} {ending}" for ending, n in passed_over.most_common())
        print(f"passed over in {data_dir}: {counts}", flush=True)

    if only_test:
        files = {"test": files["test"]}
    classes = list(files["test"])
    for part, images in files.items():
        if different := sorted(set(classes) ^ set(images)):
            raise ValueError(
                f"{data_dir}: {part} and test must have the same classes; "
                f"in only one of them: {', '.join(different)}"
            )
    paths = [path for part in files.values() for name in classes for path in part[name]]
    images, arrays = decode(paths, data_dir, image_size, is_all=not only_test), {}
    for part in files:
        counts = torch.tensor([len(files[part][name]) for name in classes])
        labels = torch.arange(len(classes)).repeat_interleave(counts)
        arrays[part], images = (images[: len(labels)], labels), images[len(labels) :]
    return classes, arrays


def contents(folder: str) -> tuple[list[str], list[str]]:
    """Paths of the folders and of the files in a folder, sorted, without the hidden ones.

    A link to the folder itself or to one above it is no way down, and is left out.
    """
    here = os.path.join(os.path.realpath(folder), "")
    folders, files = [], []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if is_hidden(name):
            continue
        if not os.path.isdir(path):
            files.append(path)
        elif not here.startswith(os.path.join(os.path.realpath(path), "")):
            folders.append(path)
    return folders, files


def walk(folder: str, seen: set[str]) -> Iterator[str]:
    """The files in a folder and in all below it. Links are followed, each folder is seen once."""
    seen.add(os.path.realpath(folder))
    folders, files = contents(folder)
    yield from files
    for path in folders:
        if os.path.realpath(path) not in seen:
            yield from walk(path, seen)


def list_images(root: str, passed_over: Counter) -> dict[str, list[str]]:
    """{class: paths of its pictures} of root/<class>/, both sorted; counts what is no picture.

    FileNotFoundError for what is missing or empty, ValueError for a single class.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}: {EXPECTED}")
    folders, loose = contents(root)
    if not folders:
        raise FileNotFoundError(f"no class folders in {root}: {found_in(root)}; {EXPECTED}")
    images = {}
    for folder in folders:
        name = os.path.basename(folder)
        if name != os.fsencode(name).decode(errors="replace"):
            raise ValueError(f"a class needs a name in UTF-8, got {name!a} in {root}")
        files = list(walk(folder, seen=set()))
        pictures = [path for path in files if is_picture(path)]
        if not pictures:
            raise FileNotFoundError(f"no pictures in {folder}: {found_in(folder)}")
        passed_over.update(ending(path) for path in files if not is_picture(path))
        # An accent is one character or two (macOS): the names look alike, and are one class.
        images.setdefault(unicodedata.normalize("NFC", name), []).extend(pictures)
    if len(images) == 1:
        inside = f"in {folders[0]} {found_in(folders[0])}"
        raise ValueError(f"{root} has a single class, {name}: {inside}; {EXPECTED}")
    if pictures := sum(is_picture(path) for path in loose):
        passed_over["outside the class folders"] += pictures
    return dict(sorted(images.items()))


def found_in(folder: str) -> str:
    """For a message: what there is instead of what was expected."""
    folders, files = contents(folder)
    names = [os.path.basename(path) + "/" for path in folders]
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3:,} more folders"]
    names += [f"{n:,} {kind}" for kind, n in Counter(map(ending, files)).most_common(3)]
    return "found " + (", ".join(names) or "nothing")


def is_hidden(name: str) -> bool:
    """Also what macOS, Windows and NAS boxes leave beside pictures: thumbnails, mostly."""
    machine_made = ("@eaDir", "#recycle", "__MACOSX", "Thumbs.db", "desktop.ini")
    return name.startswith(".") or name in machine_made


def ending(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without an ending"


@cache
def picture_endings() -> set[str]:
    """Of all formats that Pillow reads by itself, with what this installation brings along."""
    from PIL import Image

    endings = Image.registered_extensions()
    # PostScript would start Ghostscript; the others are names without a reader.
    others = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
    return {x for x, kind in endings.items() if kind in Image.OPEN and kind not in others}


def is_picture(path: str) -> bool:
    """By its name: not hidden, with an ending of a format that open_image reads."""
    return not is_hidden(os.path.basename(path)) and ending(path) in picture_endings()


def set_aside(images: dict, data_dir: str) -> tuple[dict, dict]:
    """A fifth of every class for the test, and one at least where there are two: (rest, test).

    The draw is a hash of the name: whatever the seed, and when pictures are added, those that were
    in the test stay there, but for one or two at the border.
    """

    def draw(path):
        return hashlib.sha256(os.fsencode(os.path.relpath(path, data_dir))).digest()

    rest, test = {}, {}
    for name, paths in images.items():
        n = min(max(1, round(len(paths) / 5)), len(paths) - 1)
        drawn = sorted(paths, key=draw)
        rest[name], test[name] = sorted(drawn[n:]), sorted(drawn[:n])
    n, total = (sum(map(len, part.values())) for part in (test, images))
    if not n:
        raise ValueError(f"{data_dir}: one picture a class leaves none to set aside for the test")
    print(
        f"{data_dir} has no test/: {n:,} of its {total:,} pictures, a fifth of every class, "
        f"are set aside for the test, the same ones in every run",
        flush=True,
    )
    return rest, test


def decode(paths: list[str], data_dir: str, image_size: int, is_all: bool) -> Tensor:
    """The pictures as uint8 (N, 3, S, S), from the cache where it has them, else from their files.

    Every picture is kept as soon as it is decoded, so that a run that is killed loses none, and the
    error that names what cannot be read comes last. Where these are not all the pictures of the
    folder, the cache holds the others too: nothing in it is written over.
    """
    from tqdm import tqdm

    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    pixels = images.view(len(paths), -1).numpy()
    stamps = [stamp(path, data_dir) for path in paths]
    missing = {key: i for i, key in enumerate(stamps)}
    cache = os.path.join(data_dir, f".cache-{image_size}.bin")
    places, end = read_cache(cache, pixels, missing)
    places = itertools.chain(places if is_all else [], range(end, end + len(missing)))
    if not missing:
        return images
    print(f"decoding {len(missing):,} images of {data_dir}, once", flush=True)

    def attempt(i, place):
        """What is wrong with the picture, or with its place in the cache, or None."""
        try:
            images[i] = open_image(paths[i], image_size)
            write_record(cache, place, stamps[i] + pixels[i].tobytes())
        except (ValueError, OSError) as error:
            return error

    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without Python's lock
    bar = {"unit": " images", "disable": True if sys.stderr is None else None}  # None: no terminal
    try:
        errors = tqdm(pool.map(attempt, missing.values(), places), total=len(missing), **bar)
        errors = [error for error in errors if error]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C: what has not begun is left
    if unreadable := [str(error) for error in errors if isinstance(error, ValueError)]:
        more = f"; and {len(unreadable) - 3:,} more" if len(unreadable) > 3 else ""
        raise ValueError("; ".join(unreadable[:3]) + more)
    if errors:  # a read-only folder, a full disk: the next run is slower
        print(f"warning: the decoded images cannot be kept: {errors[0]}", file=sys.stderr)
    return images


def stamp(path: str, data_dir: str) -> bytes:
    """16 bytes that change with a file's name, size and time; not when the folder is moved."""
    facts = [os.path.relpath(path, data_dir)]
    if os.path.exists(path):  # and is no link that leads nowhere
        facts += [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).digest()[:16]


# The cache is a row of records: stamp, pixels, crc32 of both. Each stands for itself: one that is
# damaged, half written or of another picture is a free place. So a run may be killed at any moment,
# and two that write at once can at worst undo each other's work.


def read_cache(cache: str, pixels: np.ndarray, missing: dict[bytes, int]) -> tuple[list[int], int]:
    """Fill the rows of pixels that are in the cache, and take them from missing: {stamp: row}.

    Returns the numbers of the places in the file that hold none of them, and that of its end.
    """
    free, n = [], 0
    try:
        with open(cache, "rb") as file:
            while record := file.read(16 + pixels.shape[1] + 4):
                key, crc = record[:16], zlib.crc32(record[:-4]).to_bytes(4, "little")
                if key in missing and record[-4:] == crc:
                    pixels[missing.pop(key)] = np.frombuffer(record[16:-4], np.uint8)
                else:
                    free.append(n)
                n += 1
    except OSError:  # there is none yet, or it cannot be read: decoding puts it right
        pass
    return free, n


def write_record(cache: str, place: int, record: bytes):
    def create(path, flags):
        return os.open(path, flags | os.O_CREAT, 0o666)

    with open(cache, "r+b", buffering=0, opener=create) as file:
        file.seek(place * (len(record) + 4))
        file.write(record + zlib.crc32(record).to_bytes(4, "little"))


MAX_PIXELS = 2**28  # a picture with more costs a warning, with twice as many it is refused
# What puts a picture upright, by EXIF's number of how the camera was held (1 is upright).
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
UPRIGHT |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


def open_image(path: str, image_size: int) -> Tensor:
    """A picture of any size and format as uint8 (3, image_size, image_size).

    Scaled, then cropped to the centre square; transparent pixels are painted over white.
    ValueError, with the path, for a file that is not a whole picture.
    """
    from PIL import ExifTags, Image, PngImagePlugin

    # Pillow's own limits, 89 million pixels and 1 MB of text, refuse pictures that there are.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        with open(path, "rb") as file:
            if file.read(22) == b"version https://git-lf":
                raise ValueError("it is a Git-LFS pointer to the picture: run git lfs pull")
        with Image.open(path) as image:
            # A JPEG scales itself by 2, 4 or 8 while it is read: to twice what is needed at least.
            # Its size is then a fraction, and the last column is not a whole one.
            draft = image.draft(None, (2 * image_size, 2 * image_size))
            image.load()
            w, h = draft[1][2:] if draft else image.size
            turn = image.getexif().get(ExifTags.Base.Orientation)
            if image.mode == "I" or image.mode.startswith("I;16"):
                image = Image.fromarray(eight_bits(np.asarray(image)))
            if image.mode == "F":  # nobody knows what its white is
                raise ValueError("pixels of mode F are not supported")
            if image.has_transparency_data:  # what lies below is often noise
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:  # PIL raises half a dozen types for broken files
        raise ValueError(f"cannot read the image {path}: {error}") from None
    side = min(w, h)
    box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box)
    if turn in UPRIGHT:
        image = image.transpose(Image.Transpose[UPRIGHT[turn]])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eight_bits(levels: np.ndarray) -> np.ndarray:
    """Integer levels of grey as uint8.

    The file does not say how many bits its camera had: the least of 8, 10, 12, 14 and 16 that holds
    the brightest pixel. 12-bit data shifted as if it had 16 would be nearly black.
    """
    brightest = int(levels.max())
    if levels.min() < 0 or brightest >= 2**16:
        raise ValueError(f"levels from {levels.min()} to {brightest} are not supported")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits)
    return (levels >> (bits - 8)).astype(np.uint8)


# --- drawings ------------------------------------------------------------------------------------

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
        inside = F.avg_pool2d(inside, 2)  # (m, 1, H, W): share of the pixel that is inside
        paper = uniform(0, 120, m, 3, 1, 1)
        ink = paper + uniform(60, 135, m, 3, 1, 1)  # lighter than its paper, in every channel
        noise = 10 * torch.randn(m, 3, image_size, image_size, generator=generator)
        chunks.append((paper + inside * (ink - paper) + noise).clamp(0, 255).to(torch.uint8))
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

    Stratified: every class gives its share of the val_size images, to within one image, and keeps
    one for training. ValueError for a val_size that cannot be had.
    """
    n, sizes = len(labels), labels.bincount()
    limit = min(n - 1, n - int((sizes > 1).sum()))
    if not 1 <= val_size <= limit:
        limits = (
            f"between 1 and {limit} for {n} training images of {int((sizes > 0).sum())} classes"
        )
        raise ValueError(f"val_size must be {limits}, got {val_size}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # The j-th image of a class of m stands at (j + 1/2) / m: the first val_size images in the order
    # of their places hold every class at its share.
    place = torch.empty(n, dtype=torch.float64)
    for label in labels.unique():
        mine = order[labels[order] == label]
        m = len(mine)
        place[mine] = (torch.arange(m, dtype=torch.float64) + 0.5) / m
        place[mine[-1]] = 1 if m == 1 else 2  # an only image comes late, the last of several never
    is_val = torch.zeros(n, dtype=torch.bool)
    is_val[order[place[order].argsort(stable=True)[:val_size]]] = True
    return order[~is_val[order]], order[is_val[order]]


def normalize(images: Tensor, mean: tuple | Tensor, std: tuple | Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32: (x / 255 - mean) / std in every channel.

    mean and std as tensors on the device save a copy to it, for which the CPU would wait.
    """
    mean, std = (torch.as_tensor(x, device=images.device).view(-1, 1, 1) for x in (mean, std))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)
