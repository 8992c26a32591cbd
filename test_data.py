"""
The specification of data.py: every test is a sentence about pixels, its docstring the formula or
the reason.

    1 CIFAR         2 folders          3 split and statistics    4 crop and flip
    5 RandAugment   6 normalise, mix   7 epochs                  8 shapes            9 the file

Three habits make the sentences bite:

- Tracers instead of random pictures: pixels that hold their own coordinates, or the one-hot label
  of their image, show where every value came from.
- The oracle is not the code: torchvision's own transforms, plain loops, a formula; and numbers
  are literals here, never read from data.py.
- uint8 results are compared to the bit. Random results are counted against a bound whose
  false-alarm rate is below 1e-8; the default profile repeats the same draws anyway.

Hypothesis draws sizes and an integer seed, and every tensor is made from that seed. The axis
letters are those of data.py.
"""

import ast
import dataclasses
import errno
import hashlib
import io
import itertools
import math
import os
import pickle
import socket
import tarfile
import urllib.request
from collections import Counter
from http.client import BadStatusLine
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF

import data
import evaluate

# ---- What the tests draw ----

seeds = st.integers(0, 2**31 - 1)
sizes = st.permutations(range(4, 10)).map(lambda p: p[:3])  # N, H, W: small, and no two are equal
fills = st.sampled_from([None, (124.6, 10, 255)])
magnitudes = st.integers(0, 30)
alphas = st.sampled_from([0.2, 0.8, 1.0])


def rng(seed):
    return torch.Generator().manual_seed(seed)


def noise(n, H, W, seed):
    return torch.randint(256, (n, 3, H, W), generator=rng(seed), dtype=torch.uint8)


def coordinates(n, H, W):
    """uint8 (n, 3, H, W): a pixel holds its row, its column and its image, from 1; 0 is outside."""
    axes = torch.arange(H)[:, None], torch.arange(W), torch.arange(n)[:, None, None]
    return torch.stack([axis.expand(n, H, W) + 1 for axis in axes], dim=1).to(torch.uint8)


def one_hot_images(B, H, W):
    """Float images (B, B, H, W) of B classes whose every pixel is the target of their image."""
    targets = torch.eye(B)
    return targets[:, :, None, None].repeat(1, 1, H, W), targets


def key(image):
    """The bytes of an image: what a Counter counts."""
    return image.contiguous().numpy().tobytes()


def assert_rate(count, n, p):
    """A binomial count within 6 standard deviations: false alarm 2e-9 (used where n p >= 50)."""
    assert abs(count - n * p) < 6 * math.sqrt(n * p * (1 - p)), f"{count} of {n}, expected {n * p}"


def assert_frequencies(counts, expected):
    """Only the expected keys occur, and at their shares: chi-square with d degrees of freedom is
    above d + 2 sqrt(20 d) + 40 with a chance below exp(-20) = 2e-9 (Laurent and Massart 2000)."""
    assert set(counts) <= set(expected), f"{len(set(counts) - set(expected))} foreign outcomes"
    n, d = sum(counts.values()), len(expected) - 1
    chi2 = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert chi2 < d + 2 * math.sqrt(20 * d) + 40, f"chi-square {chi2:.0f} at {d} degrees of freedom"


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


# ---- 1 CIFAR: a tiny tarball through torchvision's own code, without a network ----

CIFAR = {  # file, md5 of the official tarball, folder in it, its files for train, test and names
    "cifar10": (
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in (1, 2, 3, 4, 5)],
        "test_batch",
        "batches.meta",
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        ["train"],
        "test",
        "meta",
    ),
}
both_cifars = pytest.mark.parametrize("dataset", CIFAR)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_cifar(dataset, folder, monkeypatch):
    """Write a tarball like the official one, a few images a file; teach torchvision its md5s.

    Returns names, train images, train labels, test images, test labels.
    """
    filename, _, inside, train_files, test_file, meta_file = CIFAR[dataset]
    fine = dataset == "cifar100"
    names = [f"name {i}" for i in range(100 if fine else 10)]
    md5s, parts = {}, []
    with tarfile.open(folder / filename, "w:gz") as tar:

        def add(name, content):
            file = pickle.dumps(content, protocol=2)
            md5s[name] = hashlib.md5(file).hexdigest()
            info = tarfile.TarInfo(f"{inside}/{name}")
            info.size = len(file)
            tar.addfile(info, io.BytesIO(file))

        for i, name in enumerate([*train_files, test_file]):
            images = noise(2 + i % 3, 32, 32, seed=i)
            labels = [(7 * i + 3 * j) % len(names) for j in range(len(images))]
            entry = {"data": images.reshape(-1, 3072).numpy()}  # all red, all green, all blue
            entry["fine_labels" if fine else "labels"] = labels
            add(name, entry | ({"coarse_labels": [0] * len(labels)} if fine else {}))
            parts.append((images, torch.tensor(labels)))
        meta_key = "fine_label_names" if fine else "label_names"
        add(meta_file, {meta_key: names})

    official = datasets.CIFAR100 if fine else datasets.CIFAR10
    md5 = hashlib.md5((folder / filename).read_bytes()).hexdigest()
    monkeypatch.setattr(official, "tgz_md5", md5)
    monkeypatch.setattr(official, "train_list", [[name, md5s[name]] for name in train_files])
    monkeypatch.setattr(official, "test_list", [[test_file, md5s[test_file]]])
    meta = {"filename": meta_file, "key": meta_key, "md5": md5s[meta_file]}
    monkeypatch.setattr(official, "meta", meta)
    train = [torch.cat(column) for column in zip(*parts[:-1])]
    return names, *train, *parts[-1]


@both_cifars
def test_the_loader_returns_the_bytes_that_are_on_disk(dataset, tmp_path, monkeypatch, no_network):
    """A tarball laid into the folder is enough: files in order; red, green, blue; int64 labels."""
    names, *arrays = make_cifar(dataset, tmp_path, monkeypatch)
    got = data.load(dataset, str(tmp_path), 32)
    assert got.classes == names
    loaded = (got.train_images, got.train_labels, got.test_images, got.test_labels)
    for found, expected in zip(loaded, arrays, strict=True):
        assert found.dtype == expected.dtype and found.is_contiguous()
        assert torch.equal(found, expected)


@both_cifars
@pytest.mark.parametrize("state", ["absent", "cut"])
def test_a_missing_or_truncated_dataset_says_which_file_and_what_to_do(
    dataset, state, tmp_path, monkeypatch, no_network
):
    """One line: the file, its official md5, the folder, a mirror, and a way to go on without it."""
    filename, md5 = CIFAR[dataset][:2]
    if state == "cut":
        (tmp_path / filename).write_bytes(b"\x1f\x8b half a tarball")
    with pytest.raises(OSError) as caught:
        data.load(dataset, str(tmp_path), 32)
    message = str(caught.value)
    for part in (dataset, filename, md5, str(tmp_path), "--download-url", "--preset demo"):
        assert part in message
    assert "\n" not in message and type(caught.value) is OSError and caught.value.__cause__ is None


class Mirror:
    """Stands in for the network: answers every request with the same bytes, notes the address."""

    def __init__(self, content):
        self.content, self.asked = content, []

    def __call__(self, request, *args, **kwargs):
        self.asked.append(request.full_url)
        answer = io.BytesIO(self.content)
        answer.url, answer.length = request.full_url, len(self.content)
        return answer


def test_a_mirror_is_asked_at_its_own_address(tmp_path, monkeypatch):
    """--download-url replaces the slow host, for this call only."""
    _, images, *_ = make_cifar("cifar10", tmp_path, monkeypatch)
    mirror = Mirror((tmp_path / "cifar-10-python.tar.gz").read_bytes())
    monkeypatch.setattr(urllib.request, "urlopen", mirror)
    url = "http://mirror.example/c.tar.gz"
    got = data.load("cifar10", str(tmp_path / "elsewhere"), 32, download_url=url)
    assert torch.equal(got.train_images, images) and set(mirror.asked) == {url}
    assert datasets.CIFAR10.url == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


def test_what_a_mirror_sends_is_checked_by_md5(tmp_path, monkeypatch):
    """A pickle from a stranger runs code: nothing is unpacked that is not the official file."""
    make_cifar("cifar10", tmp_path, monkeypatch)
    content = (tmp_path / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", Mirror(content + b"!"))
    with pytest.raises(OSError, match="cifar-10-python.tar.gz"):
        data.load("cifar10", str(tmp_path / "elsewhere"), 32, download_url="http://mirror.example")
    assert not (tmp_path / "elsewhere" / "cifar-10-batches-py").exists()


def test_a_server_that_answers_nonsense_is_the_same_one_line_error(tmp_path, monkeypatch):
    """http.client's own exceptions are no OSErrors."""

    def nonsense(*args, **kwargs):
        raise BadStatusLine("?")

    monkeypatch.setattr(urllib.request, "urlopen", nonsense)
    with pytest.raises(OSError, match="--preset demo"):
        data.load("cifar10", str(tmp_path), 32)


def test_a_download_that_fails_leaves_no_folder_behind(tmp_path, monkeypatch):
    """But a folder that was there stays, and so does what lies in it."""
    monkeypatch.setattr(urllib.request, "urlopen", mock.Mock(side_effect=OSError("no network")))
    (tmp_path / "old").mkdir()
    for folder in ("new", "old"):
        with pytest.raises(OSError, match="no network"):
            data.load("cifar10", str(tmp_path / folder), 32)
    assert os.listdir(tmp_path) == ["old"]


@both_cifars
def test_cifar_is_refused_at_any_other_size_with_both_numbers_in_the_message(dataset):
    with pytest.raises(ValueError, match="32x32.*48"):
        data.load(dataset, "nowhere", 48)


def test_an_unknown_dataset_is_refused_with_the_four_that_exist():
    with pytest.raises(ValueError, match='"cifar10", "cifar100", "folder" or "shapes".*"mnist"'):
        data.load("mnist", "nowhere", 32)


# ---- 2 Folders of pictures ----


def write_picture(path, image, **options):
    """uint8 (3, H, W) as a file; PNG and BMP keep every bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)


def make_folder(root, suffix=".png", S=6):
    """train: 2 cats, 3 dogs; test: 1 cat, 2 dogs; S x S noise. Returns train and test (images,)."""
    parts = []
    for seed, (part, counts) in enumerate({"train": (2, 3), "test": (1, 2)}.items()):
        images = noise(sum(counts), S, S, seed)
        names = [f"cat/{i}" for i in range(counts[0])] + [f"dog/{i}" for i in range(counts[1])]
        for name, image in zip(names, images):
            write_picture(root / part / f"{name}{suffix}", image)
        parts.append(images)
    return parts


def load_folder(root, S=6):
    return data.load("folder", str(root), S)


def decoded(root, S=6):
    """The paths that loading this folder decodes, in order, relative to it."""
    with mock.patch.object(data, "open_image", wraps=data.open_image) as spy:
        load_folder(root, S)
    return [os.path.relpath(call.args[0], root) for call in spy.call_args_list]


def test_a_folder_comes_back_pixel_by_pixel_with_its_labels(tmp_path):
    """Labels are places in the sorted class names, the same for train and test."""
    train, test = make_folder(tmp_path)
    got = load_folder(tmp_path)
    assert got.classes == ["cat", "dog"]
    assert torch.equal(got.train_images, train) and torch.equal(got.test_images, test)
    assert torch.equal(got.train_labels, torch.tensor([0, 0, 1, 1, 1]))
    assert torch.equal(got.test_labels, torch.tensor([0, 1, 1]))


def test_hidden_files_and_folders_are_skipped(tmp_path):
    """.ipynb_checkpoints is no class, and macOS leaves a ._name.png beside every name.png."""
    make_folder(tmp_path)
    expected = decoded(tmp_path)
    write_picture(tmp_path / "train/.ipynb_checkpoints/0.png", noise(1, 6, 6, 9)[0])
    (tmp_path / "train/cat/._0.png").write_bytes(b"not a picture")
    (tmp_path / "train/cat/notes.txt").write_text("not a picture")
    assert load_folder(tmp_path).classes == ["cat", "dog"]
    assert sorted({*expected, *decoded(tmp_path)}) == sorted(expected)


def test_hidden_folders_inside_a_class_are_skipped(tmp_path):
    """Jupyter keeps copies of files that were opened in <class>/.ipynb_checkpoints."""
    make_folder(tmp_path)
    write_picture(tmp_path / "train/cat/.ipynb_checkpoints/0.png", noise(1, 6, 6, 9)[0])
    assert len(load_folder(tmp_path).train_images) == 5


def test_a_dataset_may_lie_below_a_hidden_folder(tmp_path):
    """In ~/.cache/pictures nothing is hidden but what is hidden there."""
    train, _ = make_folder(tmp_path / ".cache")
    assert torch.equal(load_folder(tmp_path / ".cache").train_images, train)


def test_a_missing_folder_is_named_with_what_it_should_hold(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "test").rename(tmp_path / "validation")
    with pytest.raises(FileNotFoundError) as caught:
        load_folder(tmp_path)
    assert str(tmp_path / "test") in str(caught.value) and "<class>/" in str(caught.value)


def test_a_folder_without_classes_is_refused(tmp_path):
    """Pictures lying directly in train/ have no label."""
    write_picture(tmp_path / "train/0.png", noise(1, 6, 6, 0)[0])
    with pytest.raises(FileNotFoundError) as caught:
        load_folder(tmp_path)
    assert f"no class folders in {tmp_path / 'train'}" in str(caught.value)


def test_an_empty_class_is_refused_by_name(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/emu").mkdir()
    (tmp_path / "test/emu").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        load_folder(tmp_path)
    assert str(tmp_path / "train/emu") in str(caught.value)


def test_different_classes_in_train_and_test_are_refused_by_name(tmp_path):
    """ImageFolder numbers them apart: a dog of train and an emu of test would share label 1."""
    make_folder(tmp_path)
    (tmp_path / "test/dog").rename(tmp_path / "test/emu")
    with pytest.raises(ValueError, match="dog, emu") as caught:
        load_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "cat" not in str(caught.value).split(":")[-1]


@pytest.mark.parametrize("broken", ["cut.jpg", "text.png", "empty.png"])
def test_a_file_that_is_not_a_whole_picture_is_refused_by_its_path(broken, tmp_path):
    """PIL alone reports a truncated JPEG without saying which of 60,000 files it is."""
    make_folder(tmp_path)
    path = tmp_path / "train/dog" / broken
    write_picture(path, noise(1, 40, 40, 0)[0])
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[path.stem])
    with pytest.raises(ValueError) as caught:
        load_folder(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


GREY = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
COLOURS = noise(1, 6, 6, 3)[0].permute(1, 2, 0).numpy()
PALETTE = Image.fromarray(GREY // 7).convert("P")
PALETTE.putpalette([level for i in range(256) for level in (i, 255 - i, 7 * i % 256)])


@pytest.mark.parametrize(
    "name, picture, expected",
    [
        ("grey", Image.fromarray(GREY), [GREY] * 3),
        ("alpha", Image.fromarray(np.dstack([COLOURS, GREY])), COLOURS.transpose(2, 0, 1)),
        ("palette", PALETTE, [GREY // 7, 255 - GREY // 7, GREY]),
        ("bits", Image.fromarray(GREY > 100), [255 * (GREY > 100)] * 3),
        ("16", Image.fromarray(GREY.astype(np.uint16) * 257), [GREY] * 3),
    ],
)
def test_pictures_of_any_mode_become_their_red_green_and_blue(name, picture, expected, tmp_path):
    """Grey is repeated, alpha dropped, a palette looked up, 16 bits scaled to 8."""
    picture.save(tmp_path / f"{name}.png")
    got = data.open_image(str(tmp_path / f"{name}.png"), 6)
    assert got.dtype == torch.uint8
    assert torch.equal(got, torch.from_numpy(np.array(expected, dtype=np.uint8)))


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    PALETTE.save(tmp_path / "a.png", transparency=bytes(range(256)))
    expected = np.array([GREY // 7, 255 - GREY // 7, GREY])
    assert torch.equal(data.open_image(str(tmp_path / "a.png"), 6), torch.from_numpy(expected))


def test_pictures_without_a_known_white_are_refused_by_their_path(tmp_path):
    """PIL would clip floats and 32-bit integers at 255, to black or white pictures."""
    path = tmp_path / "a.tiff"
    Image.fromarray(GREY.astype(np.float32)).save(path)
    with pytest.raises(ValueError, match="a.tiff.*mode F"):
        data.open_image(str(path), 6)


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), seeds)
@example((1, 40), 0)
def test_pictures_of_any_size_become_square(tmp_path_factory, size, seed):
    """(3, S, S), by bicubic scaling of the centre square, the one PIL's own fit cuts."""
    path = tmp_path_factory.mktemp("odd") / "a.png"
    write_picture(path, noise(1, *size, seed)[0])
    with Image.open(path) as image:
        expected = ImageOps.fit(image, (7, 7), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert torch.equal(data.open_image(str(path), 7), expected)


@pytest.mark.parametrize("rows, columns", [(slice(2, 8), slice(0, 6)), (slice(0, 6), slice(2, 8))])
def test_a_long_picture_keeps_its_middle_unscaled_if_that_fits(rows, columns, tmp_path):
    """6 x 10 and 10 x 6: two rows or columns go on either side, and nothing is squashed."""
    image = noise(1, rows.stop + rows.start, columns.stop + columns.start, 0)[0]
    write_picture(tmp_path / "a.png", image)
    assert torch.equal(data.open_image(str(tmp_path / "a.png"), 6), image[:, rows, columns])


@pytest.mark.parametrize("orientation, turns", [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_a_photo_taken_with_the_camera_turned_stands_upright(orientation, turns, tmp_path):
    """EXIF orientation 8 means: turn a quarter left to see it upright."""
    image, exif = noise(1, 6, 6, 0)[0], Image.Exif()
    exif[0x0112] = orientation
    write_picture(tmp_path / "a.png", image, exif=exif)
    upright = torch.rot90(image, turns, (1, 2))
    assert torch.equal(data.open_image(str(tmp_path / "a.png"), 6), upright)


def test_the_second_load_decodes_nothing_and_returns_the_same(tmp_path):
    train, test = make_folder(tmp_path)
    first = load_folder(tmp_path)
    with mock.patch.object(data, "open_image", side_effect=AssertionError("decoded again")):
        second = load_folder(tmp_path)
    assert torch.equal(second.train_images, train) and torch.equal(second.test_images, test)
    assert torch.equal(second.train_labels, first.train_labels)
    assert torch.equal(second.test_labels, first.test_labels)
    assert (second.classes, second.mean, second.std) == (first.classes, first.mean, first.std)


def another_time(root):
    path = root / "train/cat/0.bmp"
    stat = path.stat()
    write_picture(path, noise(1, 6, 6, 99)[0])  # a BMP of the same size in bytes
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def another_size(root):
    path = root / "train/cat/0.bmp"
    stat = path.stat()
    write_picture(path, noise(1, 7, 6, 99)[0])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as some unpackers restore it


@pytest.mark.parametrize(
    "change",
    [
        another_time,
        another_size,
        lambda root: write_picture(root / "test/dog/9.bmp", noise(1, 6, 6, 99)[0]),
        lambda root: (root / "test/dog/1.bmp").unlink(),
        lambda root: (root / "train/cat/0.bmp").rename(root / "train/cat/9.bmp"),
        lambda root: [(root / x / "dog").rename(root / x / "ant") for x in ("train", "test")],
    ],
    ids=["other time", "other size", "added", "removed", "renamed", "class renamed"],
)
def test_the_cache_is_made_anew_when_a_file_changes(change, tmp_path):
    """And a further load reads the new one. All files get one time, as unpackers may leave them."""
    make_folder(tmp_path, ".bmp")
    for path in tmp_path.rglob("*.bmp"):
        os.utime(path, ns=(10**18, 10**18))
    load_folder(tmp_path)
    change(tmp_path)
    paths = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.bmp"))]
    assert sorted(decoded(tmp_path)) == paths
    assert decoded(tmp_path) == []


def test_a_folder_is_decoded_once_by_whatever_path(tmp_path, monkeypatch):
    """Relative, absolute, and moved."""
    make_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert [len(decoded(root)) for root in ("pets", "./pets/", tmp_path / "pets")] == [8, 0, 0]
    os.rename("pets", "animals")
    assert decoded("animals") == []


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    """Bytes of an old zip, say: it could be trained on, and not be printed or drawn."""
    make_folder(tmp_path)
    for part in ("train", "test"):
        os.rename(tmp_path / part / "cat", os.fsencode(tmp_path / part) + b"/caf\xe9")
    with pytest.raises(ValueError, match="surrogates"):
        load_folder(tmp_path)


def test_every_image_size_has_a_cache_of_its_own(tmp_path):
    """Going back to 6 pixels after a run at 9 decodes nothing."""
    make_folder(tmp_path)
    assert [len(decoded(tmp_path, S)) for S in (6, 9, 6, 9)] == [8, 8, 0, 0]
    assert load_folder(tmp_path, 9).train_images.shape == (5, 3, 9, 9)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "foreign"])
def test_a_damaged_cache_is_ignored_and_replaced(damage, tmp_path):
    make_folder(tmp_path)
    expected = load_folder(tmp_path)
    (cache,) = tmp_path.glob(".cache*")
    whole = cache.read_bytes()
    cache.write_bytes({"text": b"hello", "cut": whole[: len(whole) // 2]}.get(damage, b""))
    if damage == "foreign":
        torch.save([1, 2, 3], cache)
    assert torch.equal(load_folder(tmp_path).train_images, expected.train_images)
    assert decoded(tmp_path) == []


class Payload:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_hidden_in_a_cache_is_not_run(tmp_path):
    """A folder of pictures from a stranger may bring a cache along."""
    make_folder(tmp_path / "pictures")
    expected = load_folder(tmp_path / "pictures")
    (cache,) = (tmp_path / "pictures").glob(".cache*")
    trap = tmp_path / "hacked"
    torch.save({"key": Payload(str(trap)), "arrays": []}, cache)
    assert torch.equal(load_folder(tmp_path / "pictures").train_images, expected.train_images)
    assert not trap.exists()
    torch.save({"key": Payload(str(trap)), "arrays": []}, cache)
    torch.load(cache, weights_only=False)
    assert trap.exists()  # the trap would have worked


def fail_to_open(path, mode="r", *args, _open=open, **kwargs):
    if "w" in mode:
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    return _open(path, mode, *args, **kwargs)


def fail_to_replace(*args):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("what", ["builtins.open", "os.replace"])
def test_a_read_only_place_costs_a_warning_and_nothing_else(what, tmp_path, monkeypatch, capsys):
    """Data sets often lie on a shared disk that nobody may write to."""
    train, test = make_folder(tmp_path)
    monkeypatch.setattr(what, {"builtins.open": fail_to_open, "os.replace": fail_to_replace}[what])
    got = load_folder(tmp_path)
    assert torch.equal(got.train_images, train) and torch.equal(got.test_images, test)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "Read-only" in warning
    assert not list(tmp_path.glob(".cache*"))


def test_saving_replaces_the_file_with_one_that_loads(tmp_path):
    path = str(tmp_path / "a.pt")
    for numbers in ([1, 2], [3]):
        data.save_atomically({"numbers": torch.tensor(numbers)}, path)
        assert torch.load(path, weights_only=True)["numbers"].tolist() == numbers
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("reason", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_whole_and_nothing_beside_it(reason, tmp_path):
    """The disk fills up, or the user presses Ctrl-C, when half of the new file is written."""

    def half(obj, file):
        file.write(b"half of a file")
        raise reason

    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(type(reason)) as caught:
        data.save_atomically({}, str(path), half)
    assert caught.value is reason  # not hidden behind torch's "unexpected pos"
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.pt"]


def test_a_new_file_is_on_the_disk_before_it_takes_the_place_of_the_old(tmp_path):
    """Without fsync a power failure can leave the new name with no content."""
    path, events = tmp_path / "a.pt", []
    path.write_bytes(b"old")

    def fsync(number):
        events.append(("fsync", path.read_bytes(), os.fstat(number).st_size))

    def replace(source, target, really=os.replace):
        events.append(("replace", path.read_bytes(), os.stat(source).st_size))
        really(source, target)

    with mock.patch.object(os, "fsync", fsync), mock.patch.object(os, "replace", replace):
        data.save_atomically(b"newer", str(path), lambda obj, file: file.write(obj))
    assert events == [("fsync", b"old", 5), ("replace", b"old", 5)]


# ---- 3 Split and statistics ----


@given(st.integers(2, 50), st.data(), seeds)
def test_train_and_validation_are_disjoint_cover_everything_and_never_move(n, more, seed):
    """Together 0..n-1, each once; the same seed gives the same split in the same order."""
    val_size = more.draw(st.integers(1, n - 1))
    train, val = data.split(n, val_size, seed)
    assert len(val) == val_size and sorted(torch.cat([train, val]).tolist()) == list(range(n))
    again = data.split(n, val_size, seed)
    assert torch.equal(train, again[0]) and torch.equal(val, again[1])


def test_the_split_is_shuffled_by_its_seed():
    """Folders come sorted by class: the last 5,000 images would be 5,000 trucks. Two of 1,000!
    orders agree, and one is sorted, with a chance of 1e-2567."""
    parts = [torch.cat(data.split(1000, 100, seed)).tolist() for seed in (0, 1)]
    assert parts[0] != parts[1] and all(part != sorted(part) for part in parts)
    val = data.split(1000, 100, 0)[1]
    assert_rate((val < 500).sum().item(), 100, 0.5)


@pytest.mark.parametrize("val_size", [-1, 0, 10, 11])
def test_a_split_that_leaves_a_part_empty_is_refused_with_both_numbers(val_size):
    with pytest.raises(ValueError, match=f"9 for 10 training images, got {val_size}"):
        data.split(10, val_size, 0)


def test_a_split_may_keep_a_single_image_on_either_side():
    assert [len(part) for part in data.split(10, 9, 0)] == [1, 9]
    assert [len(part) for part in data.split(10, 1, 0)] == [9, 1]


def statistics(images):
    """The definition, in float64: mean and deviation of all pixels of a channel together."""
    pixels = images.permute(1, 0, 2, 3).flatten(1).numpy().astype(np.float64) / 255
    return pixels.mean(axis=1), pixels.std(axis=1)


def test_the_fingerprint_is_of_pixels_labels_and_their_order():
    """The split is one of places: with other pictures there, validation images are trained on."""
    base = data.load("shapes", "", 1)
    images, labels = base.train_images, base.train_labels
    same = dataclasses.replace(base, train_images=images.clone(), train_labels=labels.clone())
    assert base.fingerprint == same.fingerprint and len(base.fingerprint) == 64
    one_pixel, one_label = images.clone(), labels.clone()
    one_pixel[7, 1, 0, 0] ^= 1
    one_label[7] += 1
    for changed in (one_pixel, images.flip(0)):
        assert dataclasses.replace(base, train_images=changed).fingerprint != base.fingerprint
    assert dataclasses.replace(base, train_labels=one_label).fingerprint != base.fingerprint


def test_a_channel_of_one_value_is_normalised_to_zero(tmp_path):
    """Red drawings, say: dividing by their deviation would make every loss nan."""
    red = noise(2, 8, 8, 0)
    red[:, 1:] = torch.tensor([0, 7]).view(2, 1, 1)
    for part in ("train", "test"):
        for name, image in zip("ab", red):
            write_picture(tmp_path / part / name / "1.png", image)
    got = data.load("folder", str(tmp_path), 8)
    x = data.normalize(got.train_images, got.mean, got.std)
    assert x[:, 0].std() > 0.9 and x[:, 1:].abs().max() < 1e-6


def test_one_pixel_is_the_smallest_picture():
    assert data.load("shapes", "", 1).test_images.shape == (2_000, 3, 1, 1)


@given(sizes, seeds)
def test_channel_statistics_are_those_of_all_pixels_together(size, seed):
    """Images of different brightness: the mean of each image's own deviation would be smaller."""
    images = noise(*size, seed) // torch.tensor([1, 2, 3])[:, None, None].to(torch.uint8)
    images = images // torch.arange(1, len(images) + 1)[:, None, None, None].to(torch.uint8)
    for found, expected in zip(data.channel_statistics(images), statistics(images)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_normalisation_constants_are_those_of_the_training_set(
    tmp_path, monkeypatch, no_network
):
    """The published numbers of both CIFARs; the deviation is not the often pasted 0.2023."""
    published = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    for dataset, constants in published.items():
        make_cifar(dataset, tmp_path, monkeypatch)
        got = data.load(dataset, str(tmp_path), 32)
        assert (got.mean, got.std) == constants


@pytest.mark.parametrize("dataset", CIFAR)
def test_the_normalisation_constants_are_recomputed_where_the_real_set_is_present(dataset):
    """Four digits, from the 50,000 training images in data/."""
    folder = Path(data.__file__).parent / "data"
    if not (folder / CIFAR[dataset][2]).is_dir():
        pytest.skip(f"needs {CIFAR[dataset][2]} in data/")
    got = data.load(dataset, str(folder), 32)
    for constants, found in zip((got.mean, got.std), data.channel_statistics(got.train_images)):
        assert constants == tuple(round(x, 4) for x in found)


def test_a_folder_is_normalised_by_its_own_training_images(tmp_path):
    train, _ = make_folder(tmp_path)
    got = load_folder(tmp_path)
    for found, expected in zip((got.mean, got.std), statistics(train)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


# ---- 4 Crop and flip ----


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
    for before, after in zip(images, data.random_crop(images, padding, rng(seed)), strict=True):
        assert key(after) in windows(before, padding)


def test_every_crop_offset_occurs_and_no_other():
    """5 x 5 offsets with padding 2, equally often. (hlb-CIFAR10 never reaches the last one.)"""
    (image,) = coordinates(1, 5, 7)
    out = data.random_crop(image.expand(5000, -1, -1, -1), 2, rng(0))
    offsets = windows(image, 2)
    counts = Counter(offsets.get(key(x)) for x in out)
    assert_frequencies(counts, {offset: 1 / 25 for offset in offsets.values()})


@given(sizes, seeds)
def test_a_flip_yields_the_image_or_its_mirror_and_both_occur(size, seed):
    """Left to right, and each with chance 1/2: the other 1,000 flips are counted."""
    images = coordinates(*size)
    for before, after in zip(images, data.random_flip(images, rng(seed)), strict=True):
        mirror = np.ascontiguousarray(before.numpy()[:, :, ::-1])
        assert key(after) in (key(before), mirror.tobytes())
    out = data.random_flip(images[:1].expand(1000, -1, -1, -1), rng(seed))
    assert_rate(sum(torch.equal(x, images[0]) for x in out), 1000, 0.5)


def drawn_windows(images, scale, ratio, seed):
    """The crops, and the windows (top, left, height, width) that they were cut from."""
    with mock.patch.object(data, "resize_windows", wraps=data.resize_windows) as spy:
        out = data.random_resized_crop(images, scale, ratio, rng(seed))
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
        expected = tvF.resized_crop(before, *window, [H, W], antialias=True)
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
    with torch.random.fork_rng():  # torchvision draws from the global stream
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
    assert_frequencies(counts, {place: 1 / 25 for place in places})


def test_a_window_that_can_never_fit_leaves_the_whole_image():
    """The full area at three times as wide, or high, does not fit into a square; and a thousandth
    of it has less than half a pixel to a side."""
    images = noise(5, 6, 6, 0)
    for area, ratio in ((1.0, 3.0), (1.0, 1 / 3), (0.001, 50.0), (0.001, 1 / 50)):
        out = data.random_resized_crop(images, (area, area), (ratio, ratio), rng(0))
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
    "random_crop": lambda x, g: data.random_crop(x, 2, g),
    "random_resized_crop": lambda x, g: data.random_resized_crop(x, (0.2, 1.0), (0.5, 2.0), g),
    "random_flip": data.random_flip,
    "rand_augment": lambda x, g: data.rand_augment(x, 2, 9, 0.9, (1, 2, 3), g),
    "augment": lambda x, g: data.augment(x, "pad", 2, 9, 1.0, None, g),
}
RANDOM = TRANSFORMS | {
    "mixup": lambda x, g: data.mixup(x.float(), torch.eye(len(x)), 1.0, g)[0],
    "cutmix": lambda x, g: data.cutmix(x, torch.eye(len(x)), 1.0, g)[0],
    "combine": lambda x, g: data.combine(x.float(), torch.eye(len(x)), 1.0, 1.0, g)[0],
    "train_batches": lambda x, g: torch.cat(
        [x for x, _ in data.train_batches(x, torch.arange(len(x)), 3, lambda *batch: batch, g)]
    ),
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
    monkeypatch.setattr(data, "CHUNK_ON_CPU", 3 * images[0].numel())
    assert torch.equal(TRANSFORMS[name](images, rng(1)), expected)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 11])
def test_chunks_come_back_in_order_each_with_its_own_draws(n, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_ON_CPU", 5)
    images, draws = torch.arange(n)[:, None] % 100, torch.arange(n)[:, None] % 7
    out = data.in_chunks(lambda x, d: 10 * x + d, images, draws)
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
    data.in_chunks(lambda x, d: seen.append(len(x)) or x, images, torch.empty(shape[0]))
    assert seen == calls


@every_random_function
def test_random_functions_draw_from_their_generator_and_from_nothing_else(name):
    """The same seed gives the same result whatever the global stream holds, and leaves that be."""
    images, results = noise(12, 16, 16, 0), []
    for elsewhere in (1, 2):
        with torch.random.fork_rng():
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
    """DeiT's order. The padding is an eighth of the side (4 at 32 pixels), the area 80 to 100 %."""
    images, generator = noise(20, 24, 24, 0), rng(7)
    expected = images
    if crop == "pad":
        expected = data.random_crop(expected, 3, generator)
    if crop == "resized":
        expected = data.random_resized_crop(expected, (0.8, 1.0), (0.75, 1 / 0.75), generator)
    expected = data.random_flip(expected, generator)
    expected = data.rand_augment(expected, 3, 20, 0.7, (9, 8, 7), generator)
    assert torch.equal(data.augment(images, crop, 3, 20, 0.7, (9, 8, 7), rng(7)), expected)


# ---- 5 RandAugment: torchvision applies one draw to a batch, image by image is the oracle ----

GEOMETRIC = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
ENHANCING = ["Brightness", "Color", "Contrast", "Sharpness"]
UNSIGNED = ["Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"]
VARIANTS = [(name, sign) for name in GEOMETRIC + ENHANCING for sign in (1, -1)]
VARIANTS += [(name, 1) for name in UNSIGNED]  # 23 different transforms at one magnitude


def by_torchvision(image, name, magnitude, sign, fill=None):
    """One operation on one image (3, H, W), by torchvision's own RandAugment and its table."""
    policy = v2.RandAugment(num_magnitude_bins=31, fill=fill)
    strengths = policy._AUGMENTATION_SPACE[name][0](31, *image.shape[1:])
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
@pytest.mark.parametrize("fill", [None, (124.6, 10, 255)])
def test_an_operation_equals_torchvisions_to_the_bit(H, W, fill):
    """All 14 operations, 31 magnitudes and both signs, on five kinds of images."""
    images = five_kinds(H, W)
    for (name, sign), magnitude in itertools.product(VARIANTS, range(31)):
        out = data.apply_operation(images, name, magnitude, sign, fill)
        expected = [by_torchvision(image, name, magnitude, sign, fill) for image in images]
        assert torch.equal(out, torch.stack(expected)), (name, magnitude, sign)


@given(sizes, magnitudes, seeds, fills)
def test_each_kernel_treats_the_images_of_a_batch_separately(size, magnitude, seed, fill):
    """f(batch)[i] = f(batch[i]): no mean, range or histogram over the batch."""
    images = noise(*size, seed) // (1 + noise(size[0], 1, 1, seed) % 5)
    for name, sign in VARIANTS:
        together = data.apply_operation(images, name, magnitude, sign, fill)
        alone = [data.apply_operation(x[None], name, magnitude, sign, fill)[0] for x in images]
        assert torch.equal(together, torch.stack(alone)), (name, sign)


def test_operation_strengths_are_the_published_ones():
    """At magnitude 30 (of 0..30) and 32 pixels, by formulas; at magnitude 9 a few by hand."""
    x = noise(1, 32, 32, 0)
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")

    def op(name, magnitude, sign=1):
        return data.apply_operation(x, name, magnitude, sign)

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
        assert torch.equal(data.apply_operation(images, name, 0, sign, (1, 2, 3)), images)


@given(sizes, magnitudes, seeds)
def test_the_fill_colour_appears_only_where_a_pixel_came_from_outside(size, magnitude, seed):
    """Every pixel of the filled result is that of the unfilled one, or the colour where that is
    black; the tracer itself has no black pixel."""
    images, fill = coordinates(*size), torch.tensor([200, 150, 250], dtype=torch.uint8)
    for name, sign in VARIANTS:
        black = data.apply_operation(images, name, magnitude, sign)
        filled = data.apply_operation(images, name, magnitude, sign, tuple(fill.tolist()))
        outside = (black == 0).all(1, keepdim=True) & (name in GEOMETRIC)
        assert torch.equal(filled, torch.where(outside, fill[:, None, None], black)), name


def test_no_operation_writes_into_its_input():
    images = five_kinds(9, 13)
    original = images.clone()
    for name, sign in VARIANTS:
        data.apply_operation(images, name, 30, sign, (1, 2, 3))
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
    with mock.patch.object(data, "in_chunks", wraps=data.in_chunks) as spy:
        out = data.rand_augment(images, num_ops, magnitude, prob, fill, rng(seed))
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
    out = data.rand_augment(image.repeat(5000, 1, 1, 1), 1, magnitude, prob, generator=rng(0))
    assert_frequencies(Counter(map(key, out)), expected)


@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_two_operations_follow_each_other_and_are_drawn_independently(prob):
    """The joint distribution of all 23 x 23 ordered pairs: the second works on what the first left,
    with an operation, a sign and a chance of its own."""
    image = telling_image()
    out = data.rand_augment(image.repeat(10_000, 1, 1, 1), 2, 9, prob, generator=rng(0))
    assert_frequencies(Counter(map(key, out)), outcomes(image[0], 9, 2, prob))


def test_by_default_randaugment_is_torchvisions():
    """Two operations at magnitude 9, always applied, black outside."""
    theirs, images = v2.RandAugment(), noise(50, 9, 13, 0)
    assert (theirs.num_ops, theirs.magnitude, theirs.num_magnitude_bins) == (2, 9, 31)
    expected = data.rand_augment(images, 2, 9, 1.0, None, rng(0))
    assert torch.equal(data.rand_augment(images, generator=rng(0)), expected)


@pytest.mark.parametrize("num_ops, prob", [(0, 1.0), (2, 0.0)])
def test_no_operations_or_no_chance_of_one_changes_nothing(num_ops, prob):
    images = noise(50, 9, 13, 0)
    assert torch.equal(data.rand_augment(images, num_ops, 30, prob, (1, 2, 3), rng(0)), images)


@given(sizes, st.integers(0, 3), magnitudes, fills, seeds)
def test_randaugment_keeps_shape_dtype_and_range(size, num_ops, magnitude, fill, seed):
    """Range: a grey image 100..119 cannot wrap around, since nothing here adds more than 255.
    (Documents; the comparison with torchvision decides.)"""
    images = noise(*size, seed)
    out = data.rand_augment(images, num_ops, magnitude, 1.0, fill, rng(seed))
    assert out.shape == images.shape and out.dtype == torch.uint8 and out.is_contiguous()


# ---- 6 Normalise and mix ----


def test_normalising_is_per_channel_and_invertible():
    """(x / 255 - mean) / std for all 256 levels in three channels of different constants."""
    mean, std = (0.5, 0.3, 0.7), (0.2, 0.25, 0.5)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    out = data.normalize(images, mean, std)
    assert out.dtype == torch.float32
    for c in range(3):
        expected = (images[:, c].double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(out[:, c].double(), expected, rtol=0, atol=1e-5)
        assert torch.equal(((out[:, c] * std[c] + mean[c]) * 255).round().byte(), images[:, c])


def test_normalising_does_not_write_into_its_input():
    images = noise(2, 4, 5, 0)
    original = images.clone()
    data.normalize(images, (0.5,) * 3, (0.2,) * 3)
    assert torch.equal(images, original)


@given(st.integers(1, 9), st.integers(2, 12), st.floats(0, 0.99), seeds)
@example(1, 2, 0.0, 0)
def test_soft_targets_sum_to_one_and_peak_at_the_label(B, K, smoothing, seed):
    """smoothing / K everywhere and 1 - smoothing more on the label (not smoothing / (K - 1))."""
    labels = torch.randint(K, (B,), generator=rng(seed))
    out = data.soft_targets(labels, K, smoothing)
    assert out.shape == (B, K) and out.dtype == torch.float32
    for row, label in zip(out, labels):
        expected = [smoothing / K + (1 - smoothing) * (k == label) for k in range(K)]
        torch.testing.assert_close(row, torch.tensor(expected))
        assert abs(row.sum().item() - 1) < 1e-5


def test_targets_are_not_smoothed_unless_asked():
    assert torch.equal(data.soft_targets(torch.tensor([2, 0]), 3), torch.eye(3)[[2, 0]])


def with_share(share):
    """Within this context Beta always draws this number."""
    return mock.patch.object(data, "draw_lambda", lambda alpha, generator: share)


@given(sizes, alphas, seeds)
def test_mixup_labels_sum_to_one(size, alpha, seed):
    """(Documents: four of five bugs keep the sum.)"""
    targets = data.mixup(*one_hot_images(*size), alpha, rng(seed))[1]
    torch.testing.assert_close(targets.sum(1), torch.ones(size[0]))


@given(sizes, alphas, seeds)
def test_mixup_mixes_labels_by_exactly_the_amount_it_mixes_pixels(size, alpha, seed):
    """Pixels are one-hot labels, so every mixed pixel is the mixed label of its image."""
    images, targets = data.mixup(*one_hot_images(*size), alpha, rng(seed))
    assert torch.equal(images, targets[:, :, None, None].expand_as(images))


@given(sizes, st.floats(0.1, 0.9))
@example([1, 4, 5], 0.25)
def test_mixup_blends_every_image_with_the_one_before_it(size, share):
    """lambda x_i + (1 - lambda) x_(i-1): another image for each, and each used once."""
    with with_share(share):
        targets = data.mixup(*one_hot_images(*size), 1.0, rng(0))[1]
    expected = torch.zeros(size[0], size[0])
    for i in range(size[0]):
        expected[i, i] += share
        expected[i, i - 1] += 1 - share
    torch.testing.assert_close(targets, expected)


@given(sizes, alphas, seeds)
def test_mixup_stays_between_its_two_parents(size, alpha, seed):
    images = noise(*size, seed).float()
    mixed, _ = data.mixup(images, torch.eye(size[0]), alpha, rng(seed))
    previous = torch.stack([images[i - 1] for i in range(size[0])])
    assert (mixed >= torch.minimum(images, previous) - 1e-3).all()
    assert (mixed <= torch.maximum(images, previous) + 1e-3).all()


@pytest.mark.parametrize("mix", [data.mixup, data.cutmix])
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
        if share == 0 and mix is data.mixup:
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
    images, targets = data.cutmix(*one_hot_images(*size), alpha, rng(seed))
    torch.testing.assert_close(images.mean((2, 3)), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(size[0]))
    assert set(images.unique().tolist()) <= {0.0, 1.0}


@given(sizes, seeds)
def test_cutmix_pastes_the_image_before_at_the_same_place(size, seed):
    """Pixel by pixel: kept, or that of the previous image."""
    images = coordinates(*size)
    with with_share(0.5):
        mixed, _ = data.cutmix(images, torch.eye(size[0]), 1.0, rng(seed))
    kept = (mixed == images).all(1, keepdim=True)
    previous = torch.stack([images[i - 1] for i in range(size[0])])
    assert torch.equal(mixed, torch.where(kept, images, previous)) and not kept.all()


def test_cutmix_boxes_are_centred_on_every_pixel_and_cut_at_the_border():
    """lambda 3/4 at 8 x 12: half of either side, so 4 x 6 around each of 96 centres, clipped.
    3,000 draws miss one of 96 equally likely boxes with a chance below 96 exp(-31) = 3e-12."""
    with with_share(0.75):
        generator, images = rng(0), one_hot_images(2, 8, 12)
        boxes = [box_of(data.cutmix(*images, 1.0, generator)[0]) for _ in range(3000)]
    expected = Counter()
    for y, x in itertools.product(range(8), range(12)):
        expected[max(y - 2, 0), min(y + 2, 8), max(x - 3, 0), min(x + 3, 12)] += 1 / 96
    assert_frequencies(Counter(boxes), expected)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_lambda_follows_beta_alpha_alpha(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), within 6 standard errors over 4,000 draws; a
    number in [0, 1] and its square have deviations of at most 1/2 and 1/8."""
    generator = rng(0)
    x = np.array([data.draw_lambda(alpha, generator) for _ in range(4000)])
    assert 0 <= x.min() and x.max() <= 1 and len(set(x)) > 1000
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(x.mean() - 1 / 2) < 6 * math.sqrt(variance / 4000)
    assert abs(((x - 1 / 2) ** 2).mean() - variance) < 6 / 8 / math.sqrt(4000)


@pytest.mark.parametrize("mix", [data.mixup, data.cutmix])
def test_a_mix_draws_lambda_with_its_alpha_and_its_generator(mix):
    generator = rng(0)
    with mock.patch.object(data, "draw_lambda", return_value=0.5) as spy:
        mix(*one_hot_images(3, 4, 5), 0.7, generator)
    spy.assert_called_once_with(0.7, generator)


def test_each_alpha_moves_only_its_own_transform():
    """A refactor of torchvision's references once handed CutMix the alpha of Mixup."""
    generator, batch = rng(0), one_hot_images(3, 4, 5)
    with mock.patch.object(data, "mixup") as mixup, mock.patch.object(data, "cutmix") as cutmix:
        for _ in range(100):
            data.combine(*batch, 0.8, 0.3, generator)
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
        mixed, soft = data.combine(images, targets, 1.0, 1.0, generator)
        counts[kind_of_mix(mixed)] += 1
        torch.testing.assert_close(mixed.mean((2, 3)), soft)
        distinct = len({key(pixel) for pixel in mixed[0].flatten(1).T})
        assert distinct == 1 or kind_of_mix(mixed) == "cutmix"
    assert_rate(counts["mixup"], 400, 0.5)


@pytest.mark.parametrize("alphas, kind", [((1.0, 0.0), "mixup"), ((0.0, 1.0), "cutmix")])
def test_an_alpha_of_zero_switches_its_transform_off(alphas, kind):
    generator, batch = rng(0), one_hot_images(3, 8, 8)
    kinds = {kind_of_mix(data.combine(*batch, *alphas, generator)[0]) for _ in range(40)}
    assert kinds == {kind}


def test_two_alphas_of_zero_leave_the_batch_alone():
    batch = one_hot_images(3, 4, 5)
    for found, original in zip(data.combine(*batch, 0.0, 0.0, rng(0)), batch, strict=True):
        assert torch.equal(found, original)


# ---- 7 Epochs ----


def untouched(images, labels):
    return images, labels


@given(st.integers(1, 60), st.integers(1, 20), seeds)
@example(7, 7, 0)
@example(6, 7, 0)
def test_an_epoch_visits_every_index_at_most_once_and_only_the_tail_is_dropped(n, B, seed):
    """n // B batches of exactly B different images, as many as it says, each with its label."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 2, 2)
    batches = data.train_batches(images, 3 * torch.arange(n), B, untouched, rng(seed))
    seen = list(batches)
    assert len(seen) == len(batches) == n // B
    assert all(x.shape == (B, 3, 2, 2) and y.shape == (B,) for x, y in seen)
    numbers = [i for x, _ in seen for i in x[:, 0, 0, 0].tolist()]
    assert len(set(numbers)) == n // B * B
    assert [i for _, y in seen for i in y.tolist()] == [3 * i for i in numbers]


def test_an_epoch_is_shuffled():
    """By seed, not sorted (chance 1/100!), and the dropped tail is not always the same."""
    orders = []
    for seed in range(5):
        x, y = torch.zeros(100, 3, 1, 1, dtype=torch.uint8), torch.arange(100)
        batches = data.train_batches(x, y, 30, untouched, rng(seed))
        orders.append([i for _, labels in batches for i in labels.tolist()])
    assert all(order != sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) == len({frozenset(o) for o in orders}) == 5


def epoch(seed):
    """As train.py makes it: augmented as a whole, then normalised, smoothed and mixed by batch."""
    generator = rng(seed)

    def collate(images, labels):
        images = data.normalize(images, (0.5,) * 3, (0.25,) * 3)
        targets = data.soft_targets(labels, 10, 0.1)
        return data.combine(images, targets, 0.8, 1.0, generator)

    images, labels = noise(20, 8, 8, 0), torch.arange(20) % 10
    images = data.augment(images, "pad", 2, 9, 1.0, None, generator)
    return list(data.train_batches(images, labels, 6, collate, generator))


@given(seeds, st.integers(1, 100))
def test_the_same_seed_and_epoch_give_the_same_batches_and_different_ones_do_not(seed, step):
    """To the bit, images and targets. (How seed and epoch make a generator is train.py's law.)"""
    one, same, other = epoch(seed), epoch(seed), epoch(seed + step)
    assert len(one) == 3
    for (x, t), (x2, t2), (x3, _) in zip(one, same, other, strict=True):
        assert torch.equal(x, x2) and torch.equal(t, t2) and not torch.equal(x, x3)


class Recorder(torch.nn.Module):
    """A model that keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        self.seen.append(images)
        return images[:, :, 0, 0]


def test_evaluation_batches_are_untouched_images_in_order():
    """Every image once, in order, normalised and nothing else; 1,003 divide by no round batch."""
    images, model = noise(1003, 3, 4, 0), Recorder()
    mean, std = (0.5, 0.3, 0.7), (0.2, 0.25, 0.5)
    with torch.no_grad():
        evaluate.predict(model, images, mean, std)
    m, s = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    torch.testing.assert_close(torch.cat(model.seen), (images / 255 - m) / s, rtol=0, atol=1e-5)


# ---- 8 Shapes: the dataset that needs no download ----


def test_the_shapes_dataset_has_the_interface_of_cifar10():
    """uint8 (N, 3, S, S), int64, ten names, 1,000 and 200 images of every class, own statistics."""
    got = data.load("shapes", "nowhere", 8)
    assert len(set(got.classes)) == 10 and all(isinstance(name, str) for name in got.classes)
    parts = ((got.train_images, got.train_labels, 1000), (got.test_images, got.test_labels, 200))
    for images, labels, count in parts:
        assert images.shape == (10 * count, 3, 8, 8) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [count] * 10
    for found, expected in zip((got.mean, got.std), statistics(got.train_images)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@given(st.integers(1, 25), seeds)
def test_the_same_seed_draws_the_same_shapes_and_the_splits_share_no_image(n, seed):
    """Bitwise, whatever the global stream holds; another seed draws other images."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        images, labels = data.draw_shapes(n, 8, seed)
        torch.manual_seed(2)
        again, labels_again = data.draw_shapes(n, 8, seed)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not {key(x) for x in images} & {key(x) for x in data.draw_shapes(n, 8, seed + 1)[0]}


def test_the_training_and_the_test_shapes_share_no_image():
    got = data.load("shapes", "nowhere", 8)
    train, test = ({key(x) for x in images} for images in (got.train_images, got.test_images))
    assert len(train) == 10_000 and len(test) == 2_000 and not train & test


def test_a_shape_is_drawn_under_its_own_name_and_the_ten_take_turns():
    """Without crosses only the images labelled "cross" change, to the bit, and all of those."""
    images, labels = data.draw_shapes(30, 16, 0)
    assert labels.tolist() == [i % 10 for i in range(30)]
    for label, name in enumerate(list(data.SHAPES)):
        with mock.patch.dict(data.SHAPES, {name: lambda u, v, r: r < 0}):
            without, _ = data.draw_shapes(30, 16, 0)
        assert torch.equal((without != images).flatten(1).any(1), labels == label), name


@pytest.fixture(scope="module")
def shapes():
    """2,000 images to fit a probe to and 1,000 to try it on: images, labels, images, labels."""
    return *data.draw_shapes(2000, 32, seed=11), *data.draw_shapes(1000, 32, seed=12)


def nearest_mean(fit, labels, test):
    """The class whose mean feature is nearest, features scaled to deviation 1."""
    means = torch.stack([fit[labels == k].mean(0) for k in range(10)])
    return torch.cdist(test / fit.std(0), means / fit.std(0)).argmin(1)


def foreground(images):
    """Where a pixel is unlike its picture's border, (N, H, W): good enough to find the shape."""
    x = images.float()
    border = torch.cat([x[..., 0], x[..., -1], x[..., 0, :], x[..., -1, :]], -1).median(-1).values
    return ((x - border[:, :, None, None]).abs().mean(1) > 40).float()


def colour(images):
    return images.double().mean((2, 3))  # (N, 3)


def place(images):
    mask, axis = foreground(images), torch.arange(32.0)
    area = mask.sum((1, 2)).clamp(min=1)
    moments = [(mask.sum(2) * axis).sum(1), (mask.sum(1) * axis).sum(1)]
    return torch.stack(moments, dim=1) / area[:, None]  # (N, 2)


@pytest.mark.parametrize("feature, limit", [(colour, 0.16), (place, 0.2)])
def test_mean_colour_and_position_do_not_give_the_class_away(feature, limit, shapes):
    """Chance is 10 %; over 1,000 images its deviation is 0.95 %, so 16 % is 6 of them away. Place
    may give a little more: triangles and crescents are heavier on one side, worth 15 %."""
    fit, labels, test, truth = shapes
    found = nearest_mean(feature(fit), labels, feature(test))
    assert (found == truth).double().mean() < limit


def test_no_linear_classifier_on_pixels_reads_the_shapes(shapes):
    """Ridge regression onto one-hot labels in closed form, for several strengths: below 50 %."""
    fit, labels, test, truth = shapes
    x, y = (images.flatten(1).float() / 255 for images in (fit, test))
    mean = x.mean(0)
    x, y = x - mean, y - mean
    kernel, targets = x @ x.T, torch.eye(10)[labels] - 0.1
    for strength in (10.0, 100.0, 1000.0):
        weights = torch.linalg.solve(kernel + strength * torch.eye(len(x)), targets)
        accuracy = ((y @ x.T @ weights).argmax(1) == truth).double().mean()
        assert accuracy < 0.5, f"{accuracy:.1%} at ridge {strength}"


def test_every_shape_stands_out_from_its_paper(shapes):
    """Ink is at least 60 levels lighter than its paper in each channel: a twentieth to a third of
    every picture is unlike its border, where noise alone would be nothing or everything."""
    share = foreground(shapes[0]).mean((1, 2))
    assert 0.04 < share.min() and share.max() < 0.4


def test_the_ten_shapes_are_ten_different_shapes():
    """Any two differ on a seventh of the points that either covers."""
    axis = torch.linspace(-1.2, 1.2, 97)
    u, v = axis[None, :], axis[:, None]
    masks = [shape(u, v, (u**2 + v**2).sqrt()).expand(97, 97) for shape in data.SHAPES.values()]
    for a, b in itertools.combinations(masks, 2):
        assert (a ^ b).sum() > (a | b).sum() / 7


# ---- 9 The file ----


def imports(nodes):
    """The top-level names of the modules that are imported in these syntax trees."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_data_py_does_not_know_any_model():
    tree = ast.parse(Path(data.__file__).read_text())
    assert not imports(ast.walk(tree)) & {"vit", "train", "evaluate", "bench"}


def test_slow_libraries_are_imported_only_inside_functions():
    """Together they take longer to import than most tests take to run."""
    tree = ast.parse(Path(data.__file__).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = [node for function in functions for node in ast.walk(function)]
    outside = imports(set(ast.walk(tree)) - set(inside))
    slow = {"torchvision", "PIL", "tqdm", "matplotlib"}
    assert slow <= imports(inside) and not slow & outside


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--image-size 0", "image_size must be at least 1, got 0"),
        ("--dataset mnist", 'got "mnist"'),
        ("--out nowhere/a.png", "nowhere/a.png"),
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
        data.main([*"--image-size 8".split(), *flags.split()])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and complaint in line
    assert not list(tmp_path.iterdir())


def test_the_program_draws_every_augmentation_into_a_picture(tmp_path, monkeypatch, capsys):
    """Among them every operation at its strongest, the signed ones in both directions."""
    import matplotlib

    matplotlib.use("Agg")
    small = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda n, size, seed: small(10, size, seed))
    path = tmp_path / "a.png"
    with mock.patch.object(data, "apply_operation", wraps=data.apply_operation) as spy:
        data.main(["--out", str(path), "--image-size", "16"])
    drawn = {call.args[1:4] for call in spy.call_args_list}  # name, magnitude, sign
    assert {(name, 30, sign) for name, sign in VARIANTS if name != "Identity"} <= drawn
    assert {(name, sign) for name, _, sign in drawn} <= set(VARIANTS)
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(10**6)) > 1000
    matplotlib.pyplot.close("all")
