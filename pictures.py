"""
Your own pictures: folders of files of any kind and size -> uint8 tensors.

    load_folder    data_dir/<class>/*   -> classes and the images and labels of every part
      list_images  one part             -> {class: paths}; what is no picture is counted
      set_aside    where there is no test part, a fifth of every class
      decode       paths                -> uint8 (N, 3, S, S), on many cores, kept for the next run
        open_image   one file           -> uint8 (3, S, S)

Axes:  N images   S image side
"""

import glob
import hashlib
import itertools
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# PIL is imported where it is used: it is slow to import, and --help need not wait.

VAL_NAMES = ("val", "valid", "validation")
LIKE_A_PART = re.compile(  # training_set, seg_train, test1, val2017
    r"(.*[-_ ])?(train(ing)?|test(ing)?|val(id(ation)?)?|pred)([-_ ]?(set|data|images|\d+))?"
)
MACHINE_MADE = (
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot"),  # of NAS
    *("__MACOSX", "Thumbs.db", "desktop.ini"),
    *("$RECYCLE.BIN", "System Volume Information", "lost+found"),  # of a disk's root
)
EXPECTED = (
    "expected <data-dir>/<class>/* with two classes or more, "
    "or <data-dir>/train/<class>/* and <data-dir>/test/<class>/*"
)


def load_folder(data_dir: str, image_size: int, only_test: bool = False) -> tuple:
    """(classes, {"train": (images, labels), "test": ..., perhaps "val": ...}) of own pictures.

    They lie in data_dir/<class>/, or in data_dir/train/<class>/ and data_dir/test/<class>/, perhaps
    with data_dir/val/<class>/. Where there is no test/, a fifth of every class is set aside for it.
    With only_test the other parts are read only where the test is set aside from them.
    """
    if not os.path.isdir(data_dir):
        raise FileNotFoundError(f"no folder {data_dir}: {EXPECTED}")
    found, loose = contents(data_dir)
    refuse_dead_links(loose)
    folders = {os.path.basename(path).lower(): path for path in found}
    parts = {name: folders[name] for name in ("train", "test", *VAL_NAMES) if name in folders}
    # A class may be called "train", as in cars, ships and trains: it has no folders in it.
    if len(parts) < len(folders) and not any(contents(path)[0] for path in parts.values()):
        parts = {}
    strange = [name for name in folders if name not in parts and LIKE_A_PART.fullmatch(name)]
    is_layout = "test" not in parts and (parts or len(strange) == len(folders) > 1)
    if strange and is_layout:  # as in many archives of Kaggle, and in COCO
        raise ValueError(
            f"{data_dir}: {', '.join(strange)} look like parts and not like classes; {EXPECTED}"
        )
    if parts and len(folders) < len(found):  # Train and train
        raise ValueError(f"{data_dir} has a folder twice, but for capital letters: keep one")
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
        if parts:
            for path in sorted({*found} - {*parts.values()}):  # unlabeled/, say
                n = len([*walk(path, seen=set(), locked=[])])
                passed_over[f"in {os.path.basename(path)}/"] = n
    if passed_over:
        counts = ", ".join(f"{n:,} {ending}" for ending, n in passed_over.most_common())
        print(f"passed over in {data_dir}: {counts}", flush=True)

    classes = list(files["test"])
    for part, images in files.items():
        if different := sorted(set(classes) ^ set(images)):
            raise ValueError(
                f"{data_dir}: {part} and test must have the same classes; "
                f"in only one of them: {', '.join(different)}"
            )
    paths = [path for part in files.values() for name in classes for path in part[name]]
    images, arrays = decode(paths, data_dir, image_size, is_all="train" in files), {}
    for part in files:
        counts = torch.tensor([len(files[part][name]) for name in classes])
        labels = torch.arange(len(classes)).repeat_interleave(counts)
        own, images = images[: len(labels)], images[len(labels) :]
        # A slice keeps the memory of all: train.py lets go of that of the training images.
        arrays[part] = (own if part == "train" else own.clone(), labels)
    if "train" in files:
        warn_of_copies(arrays)
    return classes, arrays


def refuse_inside(out: str, data_dir: str):
    """ValueError for an output folder in a folder of pictures."""
    if os.path.realpath(out).startswith(os.path.join(os.path.realpath(data_dir), "")):
        raise ValueError(
            f"--out {out} lies in --data-dir {data_dir}, where the pictures that a run "
            f"draws would be taken for a class: choose another --out"
        )


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


def walk(folder: str, seen: set[str], locked: list[str] | None = None) -> Iterator[str]:
    """The files in a folder and in all below it. Links are followed, each folder is seen once.

    A folder that cannot be read is an OSError, or is added to locked, where that is given.
    """
    seen.add(os.path.realpath(folder))
    try:
        folders, files = contents(folder)
    except OSError:
        if locked is None:
            raise
        locked.append(folder)
        return
    yield from files
    for path in folders:
        if os.path.realpath(path) not in seen:
            yield from walk(path, seen, locked)


def list_images(root: str, passed_over: Counter) -> dict[str, list[str]]:
    """{class: paths of its pictures} of root/<class>/, in order; counts what is no picture.

    FileNotFoundError for what is missing or empty, ValueError for a single class.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}: {EXPECTED}")
    folders, loose = contents(root)
    if not folders:
        raise FileNotFoundError(f"no class folders in {root}: {found_in(root)}; {EXPECTED}")
    refuse_dead_links(loose)
    images, names = {}, [os.path.basename(folder) for folder in folders]
    for name, folder in zip(names, folders):
        if name != os.fsencode(name).decode(errors="replace"):
            raise ValueError(f"a class needs a name in UTF-8, got {name!a} in {root}")
        files = list(walk(folder, seen=set()))
        below = {os.path.relpath(os.path.dirname(path), folder).split(os.sep)[0] for path in files}
        if again := sorted(below & {*names} - {name}):
            raise ValueError(
                f"{folder} holds {', '.join(again)}, as does {root}: remove it if it is a copy, as "
                f"in some archives, else rename it"
            )
        pictures = [path for path in files if is_picture(path)]
        others = sorted({*files} - {*pictures})
        refuse_dead_links(others)
        if not pictures:
            raise FileNotFoundError(f"no pictures in {folder}: {found_in(folder)}")
        passed_over.update(map(ending, others))
        # An accent is one character or two (macOS): the names look alike, and are one class.
        images.setdefault(unicodedata.normalize("NFC", name), []).extend(pictures)
    if len(images) == 1:
        inside = f"in {folders[0]} {found_in(folders[0])}"
        raise ValueError(f"{root} has a single class, {name}: {inside}; {EXPECTED}")
    if n := sum(is_picture(path) for path in loose):
        passed_over["outside the class folders"] += n
    return dict(sorted(images.items()))


def refuse_dead_links(paths: list[str]):
    """FileNotFoundError for a link to what is not there, as on a disk that is not mounted.

    It may have been a class, a part, or a folder of a class.
    """
    for path in paths:
        target = os.path.realpath(path)
        if not os.path.lexists(target):
            raise FileNotFoundError(f"{path} is a link to {target}, which is not there")


def found_in(folder: str) -> str:
    """For a message: what there is instead of what was expected."""
    folders, files = contents(folder)
    names = [os.path.basename(path) + "/" for path in folders]
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3:,} more folders"]
    names += [f"{n:,} {kind}" for kind, n in Counter(map(ending, files)).most_common(3)]
    return "found " + (", ".join(names) or "nothing")


def is_hidden(name: str) -> bool:
    """Also what macOS, Windows, Linux and NAS boxes leave beside pictures: thumbnails, mostly.

    Not .a.jpg.icloud: a picture that older Macs have not downloaded, and that is to be counted.
    """
    return (name.startswith(".") and not name.endswith(".icloud")) or name in MACHINE_MADE


def ending(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without an ending"


@cache
def readable_formats() -> list[str]:
    """All formats that Pillow reads by itself, with what this installation brings along."""
    from PIL import Image

    Image.init()
    # PostScript, whatever the file is called, would start Ghostscript, which can be made to run a
    # stranger's code (python-pillow/Pillow#7391), and IPTC opens whatever it holds; the others are
    # names without a reader.
    return sorted({*Image.OPEN} - {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})


@cache
def picture_endings() -> set[str]:
    from PIL import Image

    readable = {*readable_formats(), "MPO"}  # which is read as a JPEG
    return {x for x, kind in Image.registered_extensions().items() if kind in readable}


def is_picture(path: str) -> bool:
    """By its name: not hidden, with an ending of a format that open_image reads."""
    return not is_hidden(os.path.basename(path)) and ending(path) in picture_endings()


def files_in(paths: list[str]) -> list[str]:
    """The files among these, and what lies in the folders among them, in order.

    A pattern such as *.jpg is expanded here where the shell does not do it, as on Windows.
    """
    found = []
    for given in paths:
        for path in [given] if os.path.exists(given) else sorted(glob.glob(given)) or [given]:
            if os.path.isdir(path):
                locked = []  # to be named as what cannot be read, like a folder without any
                files = sorted(file for file in walk(path, set(), locked) if is_picture(file))
                found += files + locked or [path]
            else:
                found.append(path)
    return found


def set_aside(images: dict, data_dir: str) -> tuple[dict, dict]:
    """A fifth of every class for the test, and one at least where there are two: (rest, test).

    The draw is a hash of the name, whatever the seed: when pictures are added, those that were in
    the test stay there, but for a few at the border (of 200, 3 or 4 when 1,000 become 2,000).
    """

    def draw(path):  # the same on Windows, and on macOS, where an accent may be two characters
        name = unicodedata.normalize("NFC", os.path.relpath(path, data_dir)).replace(os.sep, "/")
        return hashlib.sha256(os.fsencode(name)).digest()

    rest, test = {}, {}
    for name, paths in images.items():
        n = min(max(1, round(len(paths) / 5)), len(paths) - 1)
        drawn = sorted(paths, key=draw)
        rest[name], test[name] = sorted(drawn[n:]), sorted(drawn[:n])
    n, total = (sum(map(len, part.values())) for part in (test, images))
    if not n:
        raise ValueError(f"{data_dir}: one picture a class leaves none to set aside for the test")
    print(
        f"set aside for the test: {n:,} of {total:,} pictures, a fifth of each class, "
        f"the same in every run",
        flush=True,
    )
    return rest, test


def warn_of_copies(parts: dict):
    """Print a warning for each of the parts, {name: (images, labels)}, that holds a picture again.

    Of a training image a network may know the class by heart: accuracy on its copies says nothing.
    """
    seen = set()
    for name, (images, _) in parts.items():  # first those to train on, some of them held out later
        new = {hash(image.numpy().tobytes()) for image in images} - seen
        seen |= new
        if copies := len(images) - len(new):
            print(
                f"warning: {copies:,} of {len(images):,} {name} pictures are copies of others, "
                f"pixel by pixel: measured on copies of training pictures, accuracy is too good",
                flush=True,
            )


def decode(paths: list[str], data_dir: str, image_size: int, is_all: bool) -> Tensor:
    """The pictures as uint8 (N, 3, S, S), from the cache where it has them, else from their files.

    Every picture is kept as soon as it is decoded, so that a run that is killed loses none, and the
    error that names what cannot be read comes last. Where these are not all the pictures of the
    folder, the cache holds the others too: nothing in it is written over.
    """
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    pixels = images.view(len(paths), -1).numpy()
    stamps = [stamp(path, data_dir) for path in paths]
    missing = {key: i for i, key in enumerate(stamps)}
    store = os.path.join(data_dir, f".cache-{image_size}.bin")
    places, end = read_cache(store, pixels, missing)
    places = itertools.chain(places if is_all else [], range(end, end + len(missing)))
    if not missing:
        return images
    print(f"decoding {len(missing):,} images of {data_dir}, once", flush=True)

    def attempt(i, place):
        """What is wrong with the picture, or with its place in the cache, or None."""
        try:
            # by NumPy: to copy it, PyTorch would start threads for each of ours (pytorch#80777)
            pixels[i] = open_image(paths[i], image_size).numpy().reshape(-1)
            write_record(store, place, stamps[i] + pixels[i].tobytes())
        except (ValueError, OSError) as error:
            return error

    # Pillow decodes without Python's lock. Of a shared machine's cores, those that are ours.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(min(cores, 16))  # each holds a picture at its full size
    bar = {"unit": " images", "disable": True if sys.stderr is None else None}  # None: if no tty
    try:
        errors = list(tqdm(pool.map(attempt, missing.values(), places), total=len(missing), **bar))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C: what has not begun is left
    tried = [paths[i] for i in missing.values()]
    bad = {path: str(e) for path, e in zip(tried, errors) if isinstance(e, ValueError)}
    if bad:  # three with the reason, the others by name
        raise ValueError("; ".join([*list(bad.values())[:3], *list(bad)[3:]]))
    if errors := [error for error in errors if error]:  # a full disk: the next run is slower
        print(f"warning: the decoded images cannot be kept: {errors[0]}", file=sys.stderr)
    return images


DECODER = 1  # another number whenever open_image makes other pixels: caches are then of no use


def stamp(path: str, data_dir: str) -> bytes:
    """16 bytes that change with a file's name, size and time; not when the folder is moved."""
    facts = [DECODER, os.path.relpath(path, data_dir)]
    if os.path.exists(path):  # and is no link that leads nowhere
        facts += [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).digest()[:16]


# The cache is a row of records: stamp, pixels, crc32 of both. Each stands for itself: one that is
# damaged, half written or of another picture is a free place. So a run may be killed at any moment,
# and two that write at once can at worst undo each other's work.


def read_cache(cache: str, pixels: np.ndarray, missing: dict[bytes, int]) -> tuple[list[int], int]:
    """Fill the rows of pixels that are in the cache, and take them from missing: {stamp: row}.

    Returns the numbers of the places in the file that hold none of them, and how many it has.
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

    # Pillow's own limits, 89 million pixels and 1 MB of text, are too low for real pictures.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file that can be read")  # a pipe would be waited for
        with open(path, "rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise ValueError("it is a Git-LFS pointer to the picture: run git lfs pull")
        with Image.open(path, formats=readable_formats()) as image:
            # A JPEG scales itself by 2, 4 or 8 while it is read: to twice what is needed at least.
            # Its size is then a fraction, and the last column is not a whole one.
            draft = image.draft(None, (2 * image_size, 2 * image_size))
            image.load()
            w, h = draft[1][2:] if draft else image.size
            try:
                turn = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # a note that makes no sense; the pixels are whole
                turn = None
            if image.mode == "I" or image.mode.startswith("I;16"):
                image = Image.fromarray(eight_bits(np.asarray(image)))
            if image.mode == "F":  # nobody knows what its white is
                raise ValueError("pixels of mode F are not supported")
            if image.has_transparency_data:  # what lies below is often noise
                # Alpha 0 in all pixels: in a BMP or TGA that is a byte which nobody uses.
                may_be_unused = image.format in ("BMP", "DIB", "TGA")
                image = image.convert("RGBA")
                if not may_be_unused or image.getchannel("A").getbbox():
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:  # PIL raises half a dozen types for broken files
        reason = str(error) or type(error).__name__  # a MemoryError has no words
        raise ValueError(f"cannot read the image {path}: {reason}") from None
    side = min(w, h)
    box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box)
    if turn in UPRIGHT:
        image = image.transpose(Image.Transpose[UPRIGHT[turn]])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eight_bits(levels: np.ndarray) -> np.ndarray:
    """Integer levels of grey as uint8.

    The file does not say how many bits its camera had: the least of 8, 10, 12, 14 and 16 that holds
    the brightest pixel. 12-bit data shifted as if it had 16 would be nearly black. So a picture in
    the dark may come out brighter than another of the same camera: where the level itself matters,
    convert the files to 8 bits by one rule first.
    """
    brightest = int(levels.max())
    if levels.min() < 0 or brightest >= 2**16:
        raise ValueError(f"levels from {levels.min()} to {brightest} are not supported")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits)
    return (levels >> (bits - 8)).astype(np.uint8)
