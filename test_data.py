"""
The specification of data.py: every test is a sentence about files and pixels, its docstring the
formula or the reason.

    1 CIFAR    2 folders    3 pictures    4 decoding    5 split, statistics, normalise    6 shapes
    7 the file

The habits are those of test_augment.py: tracers, oracles that are not the code, literal numbers,
uint8 compared to the bit.
"""

import ast
import dataclasses
import errno
import hashlib
import io
import itertools
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import BadStatusLine
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torchvision import datasets

import data
from testing import Payload, assert_rate, imports, key, noise, seeds, sizes, write_picture

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


# ---- 2 Folders of pictures: where they lie ----


def make_part(root, counts, seed=0, suffix=".png", S=6):
    """root/<class>/<number>: counts[class] pictures of S x S noise. Returns them all in order."""
    images = noise(sum(counts.values()), S, S, seed)
    names = [f"{name}/{i}{suffix}" for name, n in counts.items() for i in range(n)]
    for name, image in zip(names, images):
        write_picture(root / name, image)
    return images


def make_folder(root, suffix=".png", S=6):
    """train: 2 cats, 3 dogs; test: 1 cat, 2 dogs; S x S noise. Returns train and test (images,)."""
    train = make_part(root / "train", {"cat": 2, "dog": 3}, 0, suffix, S)
    return train, make_part(root / "test", {"cat": 1, "dog": 2}, 1, suffix, S)


def load_folder(root, S=6, **options):
    return data.load("folder", str(root), S, **options)


def decoded(root, S=6):
    """The paths that loading this folder decodes, relative to it, sorted."""
    with mock.patch.object(data, "open_image", wraps=data.open_image) as spy:
        load_folder(root, S)
    return sorted(os.path.relpath(call.args[0], root) for call in spy.call_args_list)


def refused(root, error=ValueError, **options):
    """The one-line message with which this folder is refused."""
    with pytest.raises(error) as caught:
        load_folder(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_comes_back_pixel_by_pixel_with_its_labels(tmp_path):
    """Labels are places in the sorted class names, the same for train and test."""
    train, test = make_folder(tmp_path)
    got = load_folder(tmp_path)
    assert got.classes == ["cat", "dog"]
    assert torch.equal(got.train_images, train) and torch.equal(got.test_images, test)
    assert torch.equal(got.train_labels, torch.tensor([0, 0, 1, 1, 1]))
    assert torch.equal(got.test_labels, torch.tensor([0, 1, 1]))
    assert got.val_images is None and got.val_labels is None


@pytest.mark.parametrize("name", ["val", "valid"])
def test_a_validation_part_of_ones_own_is_used_as_it_is(name, tmp_path):
    train, test = make_folder(tmp_path)
    val = make_part(tmp_path / name, {"cat": 2, "dog": 1}, seed=2)
    got = load_folder(tmp_path)
    assert torch.equal(got.val_images, val) and got.val_labels.tolist() == [0, 0, 1]
    assert torch.equal(got.train_images, train) and torch.equal(got.test_images, test)


def test_two_validation_parts_are_refused_by_name(tmp_path):
    make_folder(tmp_path)
    for name in ("val", "valid"):
        make_part(tmp_path / name, {"cat": 1, "dog": 1})
    assert "val and valid" in refused(tmp_path)


def bag(images):
    return Counter(map(key, images))


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_fifth_of_every_class_is_set_aside_where_there_is_no_test(inside, tmp_path, capsys):
    """10 cats, 25 dogs, 3 emus, 2 foxes and an owl: 2, 5, 1, 1 and 0. None is lost or in
    both parts."""
    images = make_part(tmp_path / inside, {"cat": 10, "dog": 25, "emu": 3, "fox": 2, "owl": 1})
    got = load_folder(tmp_path)
    assert got.classes == ["cat", "dog", "emu", "fox", "owl"]
    assert got.train_labels.bincount().tolist() == [8, 20, 2, 1, 1]
    assert got.test_labels.bincount().tolist() == [2, 5, 1, 1]
    assert bag(got.train_images) + bag(got.test_images) == bag(images)
    said = [line for line in capsys.readouterr().out.splitlines() if "set aside" in line]
    assert len(said) == 1 and "9 of its 41 pictures" in said[0]
    again = load_folder(tmp_path)
    assert torch.equal(got.test_images, again.test_images)


def test_what_is_set_aside_stays_so_when_pictures_are_added(tmp_path):
    """Of 20 test pictures at most two come or go with three new ones; a new draw would change 16.
    And it is a draw: they are not the first or the last by name."""
    make_part(tmp_path, {"cat": 50, "dog": 50})
    before = load_folder(tmp_path)
    assert [key(x) for x in before.test_images[:10]] != [key(x) for x in before.train_images[:10]]
    cats = [key(x) for x in torch.cat([before.train_images[:40], before.test_images[:10]])]
    names = sorted(f"{i}.png" for i in range(50))
    by_name = [key(data.open_image(str(tmp_path / "cat" / name), 6)) for name in names]
    places = sorted(by_name.index(image) for image in cats[40:])
    assert places[0] < 20 and places[-1] > 30 and places != list(range(places[0], places[-1] + 1))
    for i, image in enumerate(noise(3, 6, 6, 7)):
        write_picture(tmp_path / f"cat/new{i}.png", image)
    after = load_folder(tmp_path)
    assert (bag(before.test_images) - bag(after.test_images)).total() <= 2


def test_one_picture_a_class_is_too_few_to_set_any_aside(tmp_path):
    make_part(tmp_path, {"cat": 1, "dog": 1})
    assert "one picture a class" in refused(tmp_path)


def test_a_folder_that_brings_only_its_test_part_can_be_evaluated(tmp_path):
    _, test = make_folder(tmp_path)
    shutil.rmtree(tmp_path / "train")
    got = load_folder(tmp_path, only_test=True)
    assert got.classes == ["cat", "dog"] and torch.equal(got.test_images, test)
    assert got.train_images.shape == (0, 3, 6, 6) and got.train_images.dtype == torch.uint8
    assert got.train_labels.shape == (0,) and got.train_labels.dtype == torch.int64
    assert (got.mean, got.std) == ((0,) * 3, (1,) * 3)  # of nothing: pixels stay as they are
    assert str(tmp_path / "train") in refused(tmp_path, FileNotFoundError)


@pytest.mark.parametrize("make", [make_folder, lambda root: make_part(root, {"a": 5, "b": 10})])
def test_the_test_part_alone_is_the_same_as_with_the_rest_and_needs_no_more_decoding(
    make, tmp_path
):
    make(tmp_path)
    alone = load_folder(tmp_path, only_test=True)
    assert len(alone.train_images) == 0
    assert len(decoded(tmp_path)) == len(load_folder(tmp_path).train_images)
    whole = load_folder(tmp_path)
    assert torch.equal(alone.test_images, whole.test_images)
    assert torch.equal(alone.test_labels, whole.test_labels)


@both_cifars
def test_the_test_part_of_cifar_comes_alone_too(dataset, tmp_path, monkeypatch, no_network):
    *_, test, labels = make_cifar(dataset, tmp_path, monkeypatch)
    got = data.load(dataset, str(tmp_path), 32, only_test=True)
    assert torch.equal(got.test_images, test) and torch.equal(got.test_labels, labels)
    assert got.train_images.shape == (0, 3, 32, 32) and got.train_labels.shape == (0,)


def test_a_class_may_be_called_train(tmp_path):
    """Cars, ships and trains: a part has class folders in it, a class has pictures."""
    make_part(tmp_path, {"car": 5, "train": 5})
    assert load_folder(tmp_path).classes == ["car", "train"]


def test_parts_may_be_written_with_a_capital(tmp_path):
    train, _ = make_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part).rename(tmp_path / part.title())
    got = load_folder(tmp_path)
    assert got.classes == ["cat", "dog"] and torch.equal(got.train_images, train)


def test_a_missing_folder_is_named_with_what_it_should_hold(tmp_path):
    message = refused(tmp_path / "nowhere", FileNotFoundError)
    assert str(tmp_path / "nowhere") in message and "<class>/" in message


def test_a_folder_without_classes_is_refused_with_what_was_found(tmp_path):
    """Pictures without a class folder have no label."""
    for name in ("a.jpg", "b.jpg", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    message = refused(tmp_path, FileNotFoundError)
    assert "2 .jpg, 1 .txt" in message and "<class>/" in message
    (tmp_path / "train").mkdir()
    assert f"{tmp_path / 'train'}: found nothing" in refused(tmp_path, FileNotFoundError)


def test_an_empty_class_is_refused_by_name_with_what_was_found(tmp_path):
    make_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "emu").mkdir()
        (tmp_path / part / "emu/1.HEIC").write_bytes(b"")
    message = refused(tmp_path, FileNotFoundError)
    assert str(tmp_path / "train/emu") in message and "1 .heic" in message


@pytest.mark.parametrize("level", ["images", "train/images"])
def test_a_folder_level_too_many_is_refused_with_what_was_found(level, tmp_path):
    """One class is no task: it would end at 100 % accuracy."""
    make_part(tmp_path / level, {"cat": 2, "dog": 2})
    message = refused(tmp_path)
    assert "single class, images" in message and "cat/, dog/" in message


def test_different_classes_in_two_parts_are_refused_by_name(tmp_path):
    """ImageFolder numbers them apart: a dog of train and an emu of test would share label 1."""
    make_folder(tmp_path)
    make_part(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / "val/dog").rename(tmp_path / "val/emu")
    message = refused(tmp_path)
    assert str(tmp_path) in message and message.endswith(": dog, emu")
    (tmp_path / "test/dog").rename(tmp_path / "test/emu")
    assert refused(tmp_path).endswith(": dog, emu")


def test_hidden_and_machine_made_files_are_skipped_without_a_word(tmp_path, capsys):
    """Copies in .ipynb_checkpoints, macOS's ._name.png and __MACOSX, thumbnails of NAS boxes."""
    train, _ = make_folder(tmp_path)
    picture = noise(1, 6, 6, 9)[0]
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "cat/.hidden", "cat/@eaDir"):
        write_picture(tmp_path / "train" / folder / "0.png", picture)
    for name in ("._0.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / "train/cat" / name).write_bytes(b"not a picture")
    got = load_folder(tmp_path)
    assert got.classes == ["cat", "dog"] and torch.equal(got.train_images, train)
    assert "passed over" not in capsys.readouterr().out


def test_files_that_are_passed_over_are_counted_by_their_ending(tmp_path, capsys):
    """32 of 40 pictures of a class can vanish as .heic; one line says so, whatever the case."""
    make_folder(tmp_path)
    for name in ("train/cat/1.heic", "train/dog/2.HEIC", "test/cat/3.txt", "test/cat/README"):
        (tmp_path / name).write_bytes(b"")
    write_picture(tmp_path / "train/loose.png", noise(1, 6, 6, 0)[0])
    load_folder(tmp_path)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("passed over")]
    for count in ("2 .heic", "1 .txt", "1 without an ending", "1 outside the class folders"):
        assert count in line


def test_a_dataset_may_lie_below_a_hidden_folder(tmp_path):
    """In ~/.cache/pictures nothing is hidden but what is hidden there."""
    train, _ = make_folder(tmp_path / ".cache")
    assert torch.equal(load_folder(tmp_path / ".cache").train_images, train)


def test_links_are_followed_but_in_no_circle(tmp_path):
    """Class folders often are links to another disk. One that leads up would label every dog a cat
    as well; two folders that hold links to each other have no end."""
    train, _ = make_folder(tmp_path)
    (tmp_path / "train/dog").rename(tmp_path / "elsewhere")
    (tmp_path / "train/dog").symlink_to("../elsewhere")
    for link, target in {
        "up": "..",
        "self": ".",
        "loop": "loop",
        "cat/up": "..",
        "cat/self": ".",
    }.items():
        (tmp_path / "train" / link).symlink_to(target)
    for here, there in (("x", "y"), ("y", "x")):
        (tmp_path / "train/cat" / here).mkdir()
        (tmp_path / "train/cat" / here / "on").symlink_to(f"../{there}")
    (tmp_path / "train/cat/1.png").rename(tmp_path / "train/cat/x/1.png")
    got = load_folder(tmp_path / "train" / ".." / "train" / "..")
    assert got.classes == ["cat", "dog"] and torch.equal(got.train_images, train)


@pytest.mark.parametrize("target", ["nowhere.png", "9.png"])
def test_a_picture_that_is_a_link_to_nowhere_or_to_itself_is_named(target, tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/cat/9.png").symlink_to(target)
    assert str(tmp_path / "train/cat/9.png") in refused(tmp_path)


def test_an_accent_in_one_character_or_in_two_is_the_same_class(tmp_path):
    """macOS unpacks café in five characters, Linux in four; within a part and between two."""
    one, two = "caf\u00e9", "cafe\u0301"
    make_part(tmp_path / "train", {one: 2, "tea": 1})
    (tmp_path / "train" / two).mkdir()
    write_picture(tmp_path / "train" / two / "9.png", noise(1, 6, 6, 9)[0])
    make_part(tmp_path / "test", {two: 1, "tea": 1})
    got = load_folder(tmp_path)
    assert got.classes == [one, "tea"] and got.train_labels.tolist() == [0, 0, 0, 1]


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    """Bytes of an old zip, say: it could be trained on, and not be printed or drawn."""
    make_folder(tmp_path)
    for part in ("train", "test"):
        os.rename(tmp_path / part / "cat", os.fsencode(tmp_path / part) + b"/caf\xe9")
    message = refused(tmp_path)
    assert "UTF-8" in message and message.isascii()


def test_a_picture_is_known_by_its_name():
    """Whatever Pillow reads, in any case; what only looks like an image, or is hidden, is none."""
    for name in ("a.jpg", "a.JPEG", "b/a.png", "a.jfif", "a.gif", "a.webp", "a.tif", "a.jp2"):
        assert data.is_picture(name), name
    for name in ("a.txt", "png", "._a.png", "b/.png", "a.pdf", "a.eps", "a.mpg", "a.heic", ""):
        assert not data.is_picture(name), name


# ---- 3 Pictures: what open_image makes of them ----


GREY = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
COLOURS = noise(1, 6, 6, 3)[0].permute(1, 2, 0).numpy()
PALETTE = Image.fromarray(GREY // 7).convert("P")
PALETTE.putpalette([level for i in range(256) for level in (i, 255 - i, 7 * i % 256)])


def opened(picture, path, S=6, **options):
    """Saved as this file and read again."""
    picture.save(path, **options)
    got = data.open_image(str(path), S)
    assert got.dtype == torch.uint8 and got.shape == (3, S, S)
    return got.numpy()


@pytest.mark.parametrize(
    "name, picture, expected",
    [
        ("grey", Image.fromarray(GREY), [GREY] * 3),
        ("palette", PALETTE, [GREY // 7, 255 - GREY // 7, GREY]),
        ("bits", Image.fromarray(GREY > 100), [255 * (GREY > 100)] * 3),
        ("colours", Image.fromarray(COLOURS), COLOURS.transpose(2, 0, 1)),
    ],
)
def test_pictures_of_any_mode_become_their_red_green_and_blue(name, picture, expected, tmp_path):
    """Grey is repeated, a palette looked up."""
    assert np.array_equal(opened(picture, tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tiff", "big-endian.tiff"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_sixteen_bits_of_grey_are_scaled_by_the_range_that_is_there(bits, suffix, tmp_path):
    """255 is white in an 8-bit camera's file, 4095 in a 12-bit one's: shifted as if there were 16
    bits, they would be nearly black. The pictures end at 245/255 of their white."""
    levels = GREY.astype(np.uint16) << (bits - 8)
    picture = Image.fromarray(levels.astype(">u2") if "big" in suffix else levels)
    assert np.array_equal(opened(picture, tmp_path / f"a{suffix}"), [GREY] * 3)


def test_a_pgm_with_its_own_white_is_read(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 6 6 4095\n" + (GREY.astype(np.uint16) * 16).astype(">u2").tobytes())
    got = data.open_image(str(path), 6).int()
    assert (got - torch.from_numpy(GREY)).abs().max() <= 1


@pytest.mark.parametrize(
    "levels", [GREY.astype(np.float32), np.int32(2**16) * GREY, -1 - GREY.astype(np.int32)]
)
def test_pictures_without_a_known_white_are_refused_by_their_path(levels, tmp_path):
    """PIL would clip floats and 32-bit integers at 255, to black or white pictures."""
    with pytest.raises(ValueError, match="a.tiff.*not supported"):
        opened(Image.fromarray(levels), tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_transparent_pixels_are_painted_over_white(suffix, tmp_path):
    """alpha c + (1 - alpha) 255, to one level; what lies hidden below is often noise."""
    alpha = GREY.copy()
    alpha[:2], alpha[-2:] = 0, 255
    picture = Image.fromarray(np.dstack([COLOURS, alpha]))
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    got = opened(picture, tmp_path / f"a{suffix}", **options).transpose(1, 2, 0)
    share = alpha[..., None] / 255
    assert np.abs(share * COLOURS + (1 - share) * 255 - got).max() <= 1
    assert (got[:2] == 255).all() and np.array_equal(got[-2:], COLOURS[-2:])


def test_a_transparent_colour_of_a_palette_a_grey_or_a_gif_is_white_too(tmp_path):
    """Named by the format beside the pixels, and read without a warning."""
    grey = np.where(GREY == 70, 255, GREY)
    assert np.array_equal(
        opened(Image.fromarray(GREY), tmp_path / "a.png", transparency=70), [grey] * 3
    )
    expected = np.array([GREY // 7, 255 - GREY // 7, GREY])
    expected[:, GREY == 70] = 255
    alphas = bytes([255] * 10 + [0] + [255] * 245)
    assert np.array_equal(opened(PALETTE, tmp_path / "b.png", transparency=alphas), expected)
    assert np.array_equal(opened(PALETTE, tmp_path / "c.gif", transparency=10), expected)


def test_the_first_frame_of_a_gif_is_the_picture(tmp_path):
    frames = [Image.fromarray(x) for x in (GREY, 255 - GREY)]
    got = opened(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(got, [GREY] * 3)


@pytest.mark.parametrize(
    "suffix", [".avif", ".jfif", ".gif", ".webp", ".bmp", ".jp2", ".ico", ".tga"]
)
def test_whatever_pillow_reads_is_trained_on(suffix, tmp_path):
    """In a class beside PNGs, where torchvision's own list of endings would pass some over."""
    if suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow reads no {suffix}")
    make_folder(tmp_path, S=16)
    write_picture(
        tmp_path / f"train/cat/9{suffix}", torch.full((3, 16, 16), 200, dtype=torch.uint8)
    )
    got = load_folder(tmp_path, S=16)
    assert got.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (got.train_images[2].int() - 200).abs().max() < 4


def test_a_png_with_two_megabytes_of_compressed_text_is_a_picture(tmp_path):
    """Editors keep their history there. Pillow refuses more than one."""
    info = PngInfo()
    info.add_text("history", "x" * 2_000_000, zip=True)
    got = opened(Image.fromarray(GREY), tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(got, [GREY] * 3)


def test_a_very_large_picture_is_a_picture_up_to_a_bound(tmp_path):
    """182 megapixels, where Pillow warns at 89 and refuses at 179. Four gigapixels would need 16 GB
    of memory, and stand in a file of a few bytes."""
    assert (opened(Image.new("L", (13_500, 13_500), 128), tmp_path / "a.jpg") == 128).all()
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 65536 65536 255\n")
    with pytest.raises(ValueError, match="a.pgm.*4294967296 pixels"):
        data.open_image(str(path), 6)


def test_a_damaged_note_about_the_camera_costs_no_picture(tmp_path):
    """EXIF that makes no sense is passed over; the pixels are whole."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = opened(Image.new("RGB", (6, 6), (9, 9, 9)), tmp_path / "a.jpg", exif=exif)
    assert (got == 9).all()


@pytest.mark.parametrize("size, S", [((480, 640), 16), ((640, 480), 24), ((333, 777), 10)])
def test_a_jpeg_that_scales_itself_while_it_is_read_loses_nothing_visible(size, S, tmp_path):
    """Within a level on average of the whole decoding, and no pixel by more than 6: a smooth
    picture with an edge. Sizes that 8 does not divide: with the last column taken for a whole one
    all is shifted, by up to 22 levels."""
    picture = Image.fromarray(noise(1, 12, 12, 0)[0].permute(1, 2, 0).numpy())
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    picture.paste((250, 20, 20), (size[0] // 3, 0, size[0] // 2, size[1]))
    got = opened(picture, tmp_path / "a.jpg", S, quality=95).astype(int)
    with Image.open(tmp_path / "a.jpg") as image:
        whole = np.array(ImageOps.fit(image, (S, S), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = np.abs(got - whole)
    assert difference.mean() < 1 and difference.max() <= 6


def test_a_large_jpeg_is_not_decoded_at_its_full_size(tmp_path):
    """1,600 pixels to 50: an eighth, 200, is still four times the target."""
    Image.new("RGB", (1600, 1600)).save(tmp_path / "a.jpg")
    with mock.patch.object(
        Image.Image, "resize", autospec=True, side_effect=Image.Image.resize
    ) as spy:
        data.open_image(str(tmp_path / "a.jpg"), 50)
    assert spy.call_args.args[0].size == (200, 200)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".webp", ".tiff"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.9])
def test_a_file_that_is_not_a_whole_picture_is_refused_by_its_path(suffix, kept, tmp_path):
    """PIL alone reports a truncated JPEG without saying which of 60,000 files it is."""
    path = tmp_path / f"a{suffix}"
    write_picture(path, noise(1, 200, 200, 0)[0])
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"a{suffix}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.open_image(str(path), 8)


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path):
    """A clone without git-lfs holds 130 bytes of text in the place of every picture."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.jpg").write_text(pointer)
    with pytest.raises(ValueError, match="a.jpg.*git lfs pull"):
        data.open_image(str(tmp_path / "a.jpg"), 6)


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


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_taken_with_the_camera_turned_stands_upright(orientation, suffix, tmp_path):
    """The eight values of EXIF's orientation, a mirror and a quarter turn each: PIL's own way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_picture(tmp_path / f"a{suffix}", noise(1, 6, 6, 0)[0], exif=exif)
    with Image.open(tmp_path / f"a{suffix}") as image:
        upright = np.array(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    assert np.array_equal(data.open_image(str(tmp_path / f"a{suffix}"), 6), upright)


# ---- 4 Decoding, once ----


def cache_of(root):
    (path,) = root.glob(".cache*")
    return path


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
    "change, again",
    [
        (another_time, ["train/cat/0.bmp"]),
        (another_size, ["train/cat/0.bmp"]),
        (
            lambda root: write_picture(root / "test/cat/00.bmp", noise(1, 6, 6, 99)[0]),
            ["test/cat/00.bmp"],
        ),
        (lambda root: (root / "test/dog/0.bmp").unlink(), []),
        (
            lambda root: (root / "train/cat/0.bmp").rename(root / "train/cat/9.bmp"),
            ["train/cat/9.bmp"],
        ),
        (
            lambda root: [(root / x / "dog").rename(root / x / "ant") for x in ("train", "test")],
            [
                f"{x}.bmp"
                for x in ("test/ant/0", "test/ant/1", *(f"train/ant/{i}" for i in range(3)))
            ],
        ),
    ],
    ids=["other time", "other size", "added", "removed", "renamed", "class renamed"],
)
def test_only_what_has_changed_is_decoded_again(change, again, tmp_path):
    """And a further load decodes nothing. All files get one time, as unpackers may leave them."""
    make_folder(tmp_path, ".bmp")
    for path in tmp_path.rglob("*.bmp"):
        os.utime(path, ns=(10**18, 10**18))
    load_folder(tmp_path)
    change(tmp_path)
    assert decoded(tmp_path) == again
    got = load_folder(tmp_path)
    assert decoded(tmp_path) == []
    for part, images in (("train", got.train_images), ("test", got.test_images)):
        files = sorted((tmp_path / part).rglob("*.bmp"))
        assert torch.equal(images, torch.stack([data.open_image(str(x), 6) for x in files]))


def test_a_folder_is_decoded_once_by_whatever_path(tmp_path, monkeypatch):
    """Relative, absolute, and moved."""
    make_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert [len(decoded(root)) for root in ("pets", "./pets/", tmp_path / "pets")] == [8, 0, 0]
    os.rename("pets", "animals")
    assert decoded("animals") == []


def test_every_image_size_has_a_cache_of_its_own(tmp_path):
    """Going back to 6 pixels after a run at 9 decodes nothing."""
    make_folder(tmp_path)
    assert [len(decoded(tmp_path, S)) for S in (6, 9, 6, 9)] == [8, 8, 0, 0]
    assert load_folder(tmp_path, 9).train_images.shape == (5, 3, 9, 9)


def test_caches_do_not_pile_up(tmp_path):
    """Pictures come and go for ten runs: there is room for five, and not for fifty."""
    make_folder(tmp_path)
    load_folder(tmp_path)
    files, size = sorted(os.listdir(tmp_path)), cache_of(tmp_path).stat().st_size
    for i in range(10):
        write_picture(tmp_path / "train/cat/0.png", noise(1, 6, 6, 10 + i)[0])
        os.utime(tmp_path / "train/cat/0.png", (i, i))
        load_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == files and cache_of(tmp_path).stat().st_size == size


@pytest.mark.parametrize("at", range(0, 8 * 128, 37))
def test_a_damaged_byte_costs_one_picture(at, tmp_path):
    """Wherever it is: in the stamp, the pixels or the checksum. It is decoded again, once."""
    train, _ = make_folder(tmp_path)
    load_folder(tmp_path)
    content = bytearray(cache_of(tmp_path).read_bytes())
    content[at] ^= 16
    cache_of(tmp_path).write_bytes(content)
    assert len(decoded(tmp_path)) == 1 and decoded(tmp_path) == []
    assert torch.equal(load_folder(tmp_path).train_images, train)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(10_000), b"half"])
def test_a_damaged_cache_is_replaced(content, tmp_path):
    """Empty, of another kind, nothing but zeros, cut in the middle of a picture."""
    train, _ = make_folder(tmp_path)
    load_folder(tmp_path)
    whole = cache_of(tmp_path).read_bytes()
    cache_of(tmp_path).write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    assert torch.equal(load_folder(tmp_path).train_images, train)
    assert decoded(tmp_path) == []


def test_nothing_in_a_cache_is_run(tmp_path):
    """A folder of pictures from a stranger may bring a cache along: it must be no pickle."""
    train, _ = make_folder(tmp_path)
    load_folder(tmp_path)
    trap = tmp_path / "hacked"
    for content in (pickle.dumps(Payload(str(trap))), bytes(16) + pickle.dumps(Payload(str(trap)))):
        cache_of(tmp_path).write_bytes(content)
        assert torch.equal(load_folder(tmp_path).train_images, train)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(str(trap))))
    assert trap.exists()  # the trap would have worked


def test_what_was_decoded_is_kept_when_the_run_is_killed(tmp_path):
    """A process that dies by SIGKILL at its 61st picture of 120, in the middle of its work."""
    make_part(tmp_path, {"cat": 60, "dog": 60})
    program = (
        "import data, itertools, os, signal, sys\n"
        "real, count = data.open_image, itertools.count()\n"
        "def deadly(path, size):\n"
        "    next(count) == 60 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(path, size)\n"
        "data.open_image = deadly\n"
        "data.load('folder', sys.argv[1], 6)\n"
    )
    folder = Path(data.__file__).parent
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=folder)
    assert run.returncode == -signal.SIGKILL
    lost = len(decoded(tmp_path)) - 60
    assert 0 <= lost < 2 * os.cpu_count()  # those in flight
    assert decoded(tmp_path) == []


def test_an_interrupt_stops_the_decoding_at_once_and_keeps_what_is_done(tmp_path):
    """Ctrl-C while the bar moves: the hundreds that wait are not decoded first."""
    make_part(tmp_path, {"cat": 100, "dog": 100})
    real, begun = data.open_image, []

    def slow(path, S):
        begun.append(path)
        time.sleep(0.01)
        if len(begun) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return real(path, S)

    with mock.patch.object(data, "open_image", slow), pytest.raises(KeyboardInterrupt):
        load_folder(tmp_path)
    assert len(begun) < 100
    assert len(decoded(tmp_path)) == 200 - len(begun)


def test_all_unreadable_files_are_named_in_one_error_and_the_others_are_kept(tmp_path):
    """Of both parts: the first three, and how many there are beside them."""
    make_folder(tmp_path)
    broken = [tmp_path / f"{part}/cat/{i}x.png" for part in ("train", "test") for i in (1, 2)]
    for path in broken:
        path.write_bytes(b"not a picture")
    message = refused(tmp_path)
    assert [str(path) in message for path in broken] == [True, True, True, False]
    assert message.endswith("and 1 more")
    for path in broken:
        path.unlink()
    assert decoded(tmp_path) == []


def test_two_that_decode_at_once_do_not_disturb_each_other(tmp_path):
    """Two threads with files of their own, as two processes would have; each picture is decoded by
    both, and what is kept is whole."""
    train = make_part(tmp_path / "train", {"cat": 40, "dog": 40}, suffix=".00.png")
    make_part(tmp_path / "test", {"cat": 1, "dog": 1}, seed=1)
    for _ in range(5):
        for path in tmp_path.glob(".cache*"):
            path.unlink()
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(load_folder, [tmp_path] * 2))
        assert all(bag(got.train_images) == bag(train) for got in found)
        assert decoded(tmp_path) == []
        assert bag(load_folder(tmp_path).train_images) == bag(train)


def test_evaluating_the_test_part_alone_forgets_nothing_of_the_rest(tmp_path):
    """A new test picture must not take the place of a training picture that is not asked for."""
    make_folder(tmp_path)
    load_folder(tmp_path)
    write_picture(tmp_path / "test/cat/9.png", noise(1, 6, 6, 9)[0])
    assert len(load_folder(tmp_path, only_test=True).test_images) == 4
    assert decoded(tmp_path) == []


def test_a_cache_is_neither_a_picture_nor_a_class(tmp_path):
    make_part(tmp_path, {"cat": 5, "dog": 5})
    first, second = load_folder(tmp_path), load_folder(tmp_path)
    assert list(tmp_path.glob(".cache*")) and first.classes == second.classes == ["cat", "dog"]
    assert not any(data.is_picture(str(path)) for path in tmp_path.glob(".cache*"))


def fail_to_open(path, mode="r", *args, _open=open, **kwargs):
    if "w" in mode or "+" in mode:
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    return _open(path, mode, *args, **kwargs)


def test_a_read_only_place_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, capsys):
    """Data sets often lie on a shared disk that nobody may write to. One line, for both parts."""
    train, test = make_folder(tmp_path)
    monkeypatch.setattr("builtins.open", fail_to_open)
    got = load_folder(tmp_path)
    assert torch.equal(got.train_images, train) and torch.equal(got.test_images, test)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "Read-only" in warning
    assert not list(tmp_path.glob(".cache*"))


def test_a_full_disk_costs_a_warning_and_keeps_what_fitted(tmp_path, capsys):
    """A limit on the size of files, which the kernel enforces: room for 19.5 pictures of 34."""
    resource = pytest.importorskip("resource")
    train = make_part(tmp_path / "train", {"ant": 16, "bee": 16})
    make_part(tmp_path / "test", {"ant": 1, "bee": 1}, seed=1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(19.5 * 128), old[1]))
    try:
        got = load_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert bag(got.train_images) == bag(train)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "too large" in warning
    assert len(decoded(tmp_path)) == 34 - 19


def test_a_program_without_a_standard_error_decodes_too(tmp_path, monkeypatch):
    """pythonw and some services have none; a bar is for terminals."""
    train, _ = make_folder(tmp_path)
    monkeypatch.setattr("sys.stderr", None)
    assert torch.equal(load_folder(tmp_path).train_images, train)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak memory")
@pytest.mark.parametrize("is_cached", [False, True])
def test_loading_needs_less_than_twice_the_memory_of_the_images(is_cached, tmp_path):
    """400 images of 256 pixels: 79 MB of uint8."""
    for i, image in enumerate(noise(400, 8, 8, 0)):
        write_picture(tmp_path / ("train", "test")[i % 2] / "ab"[i // 2 % 2] / f"{i}.bmp", image)
    if is_cached:
        load_folder(tmp_path, 256)

    def megabytes(field):
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if field in x]
        return int(line.split()[1]) / 1000

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = megabytes("VmRSS")
    got = load_folder(tmp_path, 256)
    peak, size = megabytes("VmHWM") - before, 400 * 3 * 256 * 256 / 1e6
    assert len(got.train_images) == 200 and peak < 2 * size, f"{peak / size:.2f} times"


# ---- 5 Split, statistics, normalise ----


class_labels = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(torch.tensor)


def limit_of(labels):
    """All but one image, and all but one of every class that has two."""
    return min(len(labels) - 1, len(labels) - sum(n > 1 for n in Counter(labels.tolist()).values()))


@given(class_labels, st.data(), seeds)
def test_train_and_validation_are_disjoint_cover_everything_and_never_move(labels, more, seed):
    """Together 0..n-1, each once; the same seed gives the same split in the same order."""
    assume(limit_of(labels) >= 1)
    val_size = more.draw(st.integers(1, limit_of(labels)))
    train, val = data.split(labels, val_size, seed)
    assert len(val) == val_size
    assert sorted(torch.cat([train, val]).tolist()) == list(range(len(labels)))
    again = data.split(labels, val_size, seed)
    assert torch.equal(train, again[0]) and torch.equal(val, again[1])


@given(class_labels, st.data(), seeds)
@example(torch.tensor([0] * 500 + [1] * 3), None, 0)
@example(torch.tensor([0] * 9 + [1]), None, 0)
def test_every_class_keeps_an_image_to_be_trained_on(labels, more, seed):
    """However large the validation part; a class whose few images all fell there is never learned.
    A class of one image gives it only where nothing else is left."""
    assume(limit_of(labels) >= 1)
    val_size = more.draw(st.integers(1, limit_of(labels))) if more else limit_of(labels) - 1
    train, val = (labels[part].tolist() for part in data.split(labels, val_size, seed))
    counts = Counter(labels.tolist())
    assert all(n == 1 or label in train for label, n in counts.items())
    if any(counts[label] == 1 for label in val):
        assert all(counts[label] == 1 or train.count(label) == 1 for label in train)


@given(st.lists(st.integers(2, 40), min_size=2, max_size=5), st.floats(0.05, 0.7), seeds)
def test_every_class_gives_its_share_to_within_one_image(counts, share, seed):
    """CIFAR-10's 5,000 of 50,000 are 500 a class."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    val_size = max(1, int(share * len(labels)))
    _, val = data.split(labels, val_size, seed)
    for label, n in enumerate(counts):
        assert abs((labels[val] == label).sum() - n * val_size / len(labels)) <= 1


def test_equal_classes_give_equally_many():
    labels = torch.arange(10).repeat(50)
    assert labels[data.split(labels, 50, 0)[1]].bincount().tolist() == [5] * 10


def test_the_split_is_shuffled_by_its_seed():
    """Folders come sorted by class: the last 5,000 images would be 5,000 trucks. Two of 1,000!
    orders agree, and one is sorted, with a chance of 1e-2567. Within a class any may be drawn."""
    labels = torch.arange(2).repeat_interleave(500)
    parts = [data.split(labels, 100, seed) for seed in (0, 1)]
    for one, other in zip(*parts):
        assert set(one.tolist()) != set(other.tolist())
        assert one.tolist() != sorted(one.tolist())
        assert_rate((labels[one[: len(one) // 2]] == 0).sum().item(), len(one) // 2, 0.5)
    drawn = [data.split(labels[:8], 2, seed)[1].tolist() for seed in range(600)]
    for i in range(8):
        assert_rate(sum(i in val for val in drawn), 600, 0.25)


@pytest.mark.parametrize("val_size", [-1, 0, 9, 10, 11])
def test_a_split_that_leaves_a_part_empty_is_refused_with_both_numbers(val_size):
    """Ten images in two classes: eight may go."""
    with pytest.raises(ValueError, match=f"between 1 and 8 .*10 training.*got {val_size}"):
        data.split(torch.tensor([0] * 4 + [1] * 6), val_size, 0)


def test_a_split_may_keep_a_single_image_on_either_side():
    one_class, all_different = torch.zeros(10, dtype=torch.int64), torch.arange(10)
    for labels in (one_class, all_different):
        assert [len(part) for part in data.split(labels, 9, 0)] == [1, 9]
        assert [len(part) for part in data.split(labels, 1, 0)] == [9, 1]


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


# ---- 6 Shapes: the dataset that needs no download ----


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


# ---- 7 The file ----


def test_data_py_imports_no_other_room():
    tree = ast.parse(Path(data.__file__).read_text())
    rooms = {path.stem for path in Path(data.__file__).parent.glob("*.py")}
    assert not imports(ast.walk(tree)) & rooms


def test_slow_libraries_are_imported_only_inside_functions():
    """Together they take longer to import than most tests take to run."""
    tree = ast.parse(Path(data.__file__).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = [node for function in functions for node in ast.walk(function)]
    outside = imports(set(ast.walk(tree)) - set(inside))
    slow = {"torchvision", "PIL", "tqdm"}
    assert slow <= imports(inside) and not slow & outside
