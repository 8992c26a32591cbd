"""
The specification of pictures.py: every test is a sentence about files, its docstring the formula or
the reason.

    1 folders    2 pictures    3 decoding
"""

import errno
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import pictures
from testing import (
    Payload,
    key,
    load_folder,
    make_folder,
    make_part,
    noise,
    peak_memory,
    seeds,
    write_picture,
)

# ---- 1 Folders of pictures: where they lie ----


def decoded(root, S=6):
    """The paths that loading this folder decodes, relative to it, sorted."""
    with mock.patch.object(pictures, "open_image", wraps=pictures.open_image) as spy:
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


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
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
    [said, _] = capsys.readouterr().out.splitlines()  # and the decoding: nothing is passed over
    assert "set aside" in said and "9 of 41 pictures" in said
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
    by_name = [key(pictures.open_image(str(tmp_path / "cat" / name), 6)) for name in names]
    places = sorted(by_name.index(image) for image in cats[40:])
    assert places[0] < 20 and places[-1] > 30 and places != list(range(places[0], places[-1] + 1))
    for i, image in enumerate(noise(3, 6, 6, 7)):
        write_picture(tmp_path / f"cat/new{i}.png", image)
    after = load_folder(tmp_path)
    assert (bag(before.test_images) - bag(after.test_images)).total() <= 2


def test_what_is_set_aside_is_the_same_by_whatever_path(tmp_path, monkeypatch):
    """Relative, absolute, and moved: else what was trained on would be in the test."""
    make_part(tmp_path / "pets", {"cat": 20, "dog": 20})
    monkeypatch.chdir(tmp_path)
    found = [load_folder(root).test_images for root in ("pets", "./pets/", tmp_path / "pets")]
    os.rename("pets", "animals")
    found.append(load_folder("animals").test_images)
    assert all(torch.equal(images, found[0]) for images in found)


def test_the_same_pictures_are_set_aside_on_every_system(monkeypatch):
    """Else those that one system trained on would be in the test of another. Windows has another
    separator, and macOS may give an accent as two characters."""
    names = [f"/{i}.png" for i in range(50)]
    drawn = pictures.set_aside({c: [f"ä{c}{name}" for name in names] for c in "ab"}, ".")[1]
    for separator, umlaut in (("/", "a\u0308"), ("\\", "ä"), ("\\", "a\u0308")):
        images = {c: [f"{umlaut}{c}{name}".replace("/", separator) for name in names] for c in "ab"}
        monkeypatch.setattr(pictures.os, "sep", separator)
        monkeypatch.setattr(pictures.os.path, "relpath", lambda path, _: path)
        here = pictures.set_aside(images, ".")[1]
        back = {
            c: [p.replace(separator, "/").replace("a\u0308", "ä") for p in here[c]] for c in "ab"
        }
        assert {c: sorted(back[c]) for c in back} == {c: sorted(drawn[c]) for c in drawn}


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


def test_the_test_part_alone_is_the_same_as_with_the_rest_and_needs_no_more_decoding(tmp_path):
    make_folder(tmp_path)
    alone = load_folder(tmp_path, only_test=True)
    assert len(alone.train_images) == 0
    assert len(decoded(tmp_path)) == len(load_folder(tmp_path).train_images)
    whole = load_folder(tmp_path)
    assert torch.equal(alone.test_images, whole.test_images)
    assert torch.equal(alone.test_labels, whole.test_labels)


def test_with_a_test_part_that_was_set_aside_come_those_from_which_it_was(tmp_path, capsys):
    """Whether they are still the same is for evaluate.py to see."""
    make_part(tmp_path / "train", {"a": 5, "b": 10})
    make_part(tmp_path / "val", {"a": 1, "b": 1}, seed=1)
    alone, whole = load_folder(tmp_path, only_test=True), load_folder(tmp_path)
    assert alone.fingerprint == whole.fingerprint and len(alone.train_images) == 12
    assert torch.equal(alone.test_images, whole.test_images)


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


def test_a_part_with_a_capital_and_without_is_refused(tmp_path):
    """One of the two would be left out without a word. Of classes both are kept."""
    make_folder(tmp_path / "parts")
    make_part(tmp_path / "parts" / "Train", {"cat": 1, "dog": 1})
    make_part(tmp_path / "classes", {"Cat": 2, "cat": 2})
    if not (tmp_path / "PARTS").exists():  # macOS and Windows cannot have both
        assert "has a folder twice, but for capital letters" in refused(tmp_path / "parts")
        assert load_folder(tmp_path / "classes").classes == ["Cat", "cat"]


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
    """Copies in .ipynb_checkpoints, macOS's ._name.png and __MACOSX; what NAS boxes keep of
    pictures: thumbnails, deleted ones, earlier states."""
    train, _ = make_folder(tmp_path)
    picture = noise(1, 6, 6, 9)[0]
    hidden = [".ipynb_checkpoints", "@eaDir", "__MACOSX", "cat/.hidden", "cat/@eaDir"]
    hidden += ["$RECYCLE.BIN", "System Volume Information", "lost+found"]
    for folder in (*hidden, "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot"):
        write_picture(tmp_path / "train" / folder / "0.png", picture)
    for name in ("._0.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / "train/cat" / name).write_bytes(b"not a picture")
    got = load_folder(tmp_path)
    assert got.classes == ["cat", "dog"] and torch.equal(got.train_images, train)
    assert "passed over" not in capsys.readouterr().out


def test_a_folder_to_classify_is_seen_as_a_folder_to_train_on(tmp_path):
    """Hidden folders are skipped and links followed."""
    train, _ = make_folder(tmp_path)
    write_picture(tmp_path / "train/cat/.thumbnails/0.png", noise(1, 6, 6, 9)[0])
    (tmp_path / "album").mkdir()
    (tmp_path / "album/notes.txt").touch()
    (tmp_path / "album/link").symlink_to("../train")
    found = pictures.files_in([str(tmp_path / "album"), "a.png"])
    assert len(found) == len(train) + 1 and found[-1] == "a.png"
    assert sorted(found[:-1]) == found[:-1] and not any(".thumbnails" in path for path in found)


def test_a_pattern_that_the_shell_left_alone_is_what_matches_it(tmp_path):
    """On Windows no shell expands *.png. A file may be called so, too."""
    for name in ("b.png", "a.png", "c.txt", "[a].png"):
        (tmp_path / name).touch()
    found = pictures.files_in([f"{tmp_path}/?.png", f"{tmp_path}/[a].png", f"{tmp_path}/*.gif"])
    assert found == [f"{tmp_path}/{name}" for name in ("a.png", "b.png", "[a].png", "*.gif")]
    (tmp_path / "album").mkdir()
    (tmp_path / "album/d.png").touch()
    assert pictures.files_in([f"{tmp_path}/al*"]) == [f"{tmp_path}/album/d.png"]


def test_a_folder_without_a_picture_is_named_itself(tmp_path):
    """Nobody would see that it is missing among the answers."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").touch()
    names = [str(tmp_path / name) for name in ("empty", "a.png")]
    assert pictures.files_in(names) == names


def test_copies_of_pictures_are_counted_in_every_part(tmp_path, capsys):
    """A network that knows a training image by heart is right on its copies, whatever it learned.
    They are known by their pixels, in any file format and class."""
    make_folder(tmp_path)
    load_folder(tmp_path)
    assert "warning" not in capsys.readouterr().out
    one, two, three = noise(3, 6, 6, 9)
    for name in ("train/cat/x.png", "train/dog/y.bmp", "train/dog/z.png"):
        write_picture(tmp_path / name, one)
    for name in ("test/cat/x.png", "test/dog/y.png", "val/cat/x.png"):
        write_picture(tmp_path / name, one)
    for name in ("val/cat/a.png", "val/dog/b.png"):
        write_picture(tmp_path / name, two)
    write_picture(tmp_path / "val/cat/c.png", three)
    load_folder(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    told = [x.split(" are copies of others, pixel by pixel: ")[0] for x in lines if "warning" in x]
    assert told == [f"warning: {x} pictures" for x in ("2 of 8 train", "2 of 5 test", "2 of 4 val")]
    load_folder(tmp_path, only_test=True)  # evaluate.py does not read the others
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "files, strange",
    [
        (("train/cat.0", "train/dog.0", "test1/1"), "test1, train"),  # Kaggle: dogs-vs-cats
        (("seg_train/seg_train/sea", "seg_test/seg_test/sea"), "seg_test, seg_train"),
        (("training_set/training_set/cats", "test_set/test_set/cats"), "test_set, training_set"),
        (("train2017/1", "val2017/1"), "train2017, val2017"),  # COCO
        (("train_data/cat/0", "test-images/cat/0"), "test-images, train_data"),
        (("train/cat/0", "train/dog/0", "testing/cat/0", "testing/dog/0"), "testing"),
        (("Training/cat/0", "Training/dog/0", "Testing/cat/0"), "testing, training"),
        (("seg_train/cat/0", "seg_test/cat/0", "seg_pred/0"), "seg_pred, seg_test, seg_train"),
    ],
)
def test_parts_by_other_names_are_not_taken_for_classes(files, strange, tmp_path):
    """It would learn to tell the training from the test images."""
    for file in files:
        write_picture(tmp_path / f"{file}.png", noise(1, 6, 6, 0)[0])
    assert f": {strange} look like parts and not like classes;" in refused(tmp_path)


def test_a_part_more_does_no_harm_where_there_is_a_test(tmp_path):
    make_folder(tmp_path)
    write_picture(tmp_path / "test2/0.png", noise(1, 6, 6, 0)[0])
    assert load_folder(tmp_path).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "folders",
    [
        *(
            "cat/2020 cat/2021 dog/2020 dog/2021",
            "trains/a trains/b car/a",
            "trains/2020 cars/2020",
            "train car",
            "valve trainer",
            "a/x b",
            "a/a b/x",
        ),
        "boats/a cars/a cars/b trains/a",
    ],
)
def test_classes_may_have_folders_in_them(folders, tmp_path):
    """The same in all, or one may be called train: but not both."""
    for i, folder in enumerate(folders.split()):
        for j in range(3):
            write_picture(tmp_path / folder / f"{i}{j}.png", noise(1, 6, 6, i + 9 * j)[0])
    assert load_folder(tmp_path).classes == sorted({x.split("/")[0] for x in folders.split()})


@pytest.mark.parametrize(
    "files, again",
    [
        # Kaggle: cell-images-for-detecting-malaria, plantdisease
        (("cat/0", "dog/0", "pets/cat/0", "pets/dog/0"), "pets holds cat, dog,"),
        (("PlantVillage/a/0", "plantvillage/PlantVillage/a/0"), "plantvillage holds PlantVillage,"),
    ],
)
def test_a_folder_that_holds_the_classes_again_is_not_taken_for_a_class(files, again, tmp_path):
    """It would hold copies of all the others."""
    for file in files:
        write_picture(tmp_path / f"{file}.png", noise(1, 6, 6, 0)[0])
    assert again in refused(tmp_path)


def test_files_that_are_passed_over_are_counted_by_their_ending(tmp_path, capsys):
    """32 of 40 pictures of a class can vanish as .heic; one line says so, whatever the case."""
    make_folder(tmp_path)
    names = "train/cat/1.heic train/dog/2.HEIC test/cat/3.txt test/cat/dog train/cat/.4.jpg.icloud"
    for name in names.split():
        (tmp_path / name).write_bytes(b"")
    for name in ("train/loose", "Unlabeled/1", "Unlabeled/2"):
        write_picture(tmp_path / f"{name}.png", noise(1, 6, 6, 0)[0])
    load_folder(tmp_path)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("passed over")]
    loose, other = "1 outside the class folders", "2 in Unlabeled/"
    for count in ("2 .heic", "1 .txt", "1 without an ending", "1 .icloud", loose, other):
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


@pytest.mark.parametrize("link", ["emu", "train/emu", "train/cat/2020", "val", "test"])
def test_a_class_or_a_part_that_is_a_link_to_nowhere_is_named(link, tmp_path):
    """Its disk is not mounted. A class, or most of it, would be gone without a word, and a test
    part be replaced by a fifth of the training images."""
    make_folder(tmp_path)
    if link == "test":
        shutil.rmtree(tmp_path / "test")
    (tmp_path / link).symlink_to(tmp_path / "away" / "there")
    message = refused(tmp_path, FileNotFoundError)
    assert f"{tmp_path / link} is a link to {tmp_path}/away/there, which is not there" in message


def test_a_folder_that_cannot_be_read_is_refused_with_its_name(tmp_path, monkeypatch):
    """A class without some of its pictures would be another class."""
    make_folder(tmp_path)
    (tmp_path / "train/cat/locked").mkdir()
    real = os.listdir

    def listdir(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert "train/cat/locked" in refused(tmp_path, PermissionError)


def test_an_accent_in_one_character_or_in_two_is_the_same_class(tmp_path):
    """macOS unpacks café in five characters, Linux in four; within a part and between two."""
    one, two = "caf\u00e9", "cafe\u0301"
    make_part(tmp_path / "train", {one: 2, "tea": 1})
    (tmp_path / "train" / two).mkdir(exist_ok=True)  # macOS takes both for one
    write_picture(tmp_path / "train" / two / "9.png", noise(1, 6, 6, 9)[0])
    make_part(tmp_path / "test", {two: 1, "tea": 1})
    got = load_folder(tmp_path)
    assert got.classes == [one, "tea"] and got.train_labels.tolist() == [0, 0, 0, 1]


def test_one_class_in_two_spellings_of_its_accent_is_a_single_class(tmp_path):
    make_part(tmp_path, {"caf\u00e9": 3, "cafe\u0301": 3})
    assert "single class" in refused(tmp_path)


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    """Bytes of an old zip, say: it could be trained on, and not be printed or drawn."""
    make_folder(tmp_path)
    try:
        for part in ("train", "test"):
            os.rename(tmp_path / part / "cat", os.fsencode(tmp_path / part) + b"/caf\xe9")
    except OSError:
        pytest.skip("this drive, as a Mac's, has no such names")
    message = refused(tmp_path)
    assert "UTF-8" in message and message.isascii()


def test_a_picture_is_known_by_its_name():
    """Whatever Pillow reads, in any case; what only looks like an image, or is hidden, is none."""
    names = "a.jpg a.JPEG b/a.png a.jfif a.gif a.webp a.tif a.jp2 a.mpo"
    for name in names.split():
        assert pictures.is_picture(name), name
    for name in ("a.txt", "png", "._a.png", "b/.png", "a.pdf", "a.eps", "a.mpg", "a.heic", ""):
        assert not pictures.is_picture(name), name


# ---- 2 Pictures: what open_image makes of them ----


GREY = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
COLOURS = noise(1, 6, 6, 3)[0].permute(1, 2, 0).numpy()
PALETTE = Image.fromarray(GREY // 7).convert("P")
PALETTE.putpalette([level for i in range(256) for level in (i, 255 - i, 7 * i % 256)])


def opened(picture, path, S=6, **options):
    """Saved as this file and read again."""
    picture.save(path, **options)
    got = pictures.open_image(str(path), S)
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


@pytest.mark.parametrize("suffix", [".tiff", ".jpg"])
def test_a_picture_in_the_inks_of_a_printer_has_the_colours_it_shows(suffix, tmp_path):
    """CMYK: 255 - ink where there is no black, and not the inks themselves, a negative."""
    colours = COLOURS if suffix == ".tiff" else np.full((6, 6, 3), (200, 90, 30), np.uint8)
    got = opened(Image.fromarray(colours).convert("CMYK"), tmp_path / f"a{suffix}")
    assert np.abs(got.transpose(1, 2, 0).astype(int) - colours).max() <= 2 * (suffix == ".jpg")


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
    got = pictures.open_image(str(path), 6).int()
    assert (got - torch.from_numpy(GREY)).abs().max() <= 1


@pytest.mark.parametrize(
    "levels", [GREY.astype(np.float32), np.int32(2**16) * GREY, -1 - GREY.astype(np.int32)]
)
def test_pictures_without_a_known_white_are_refused_by_their_path(levels, tmp_path):
    """PIL would clip floats and 32-bit integers at 255, to black or white pictures."""
    with pytest.raises(ValueError, match="a.tiff.*not supported"):
        opened(Image.fromarray(levels), tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp", ".tga"])
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


@pytest.mark.parametrize("suffix", [".tga", ".bmp"])
def test_a_picture_that_is_nowhere_opaque_is_all_of_it_a_picture(suffix, tmp_path):
    """Windows and Photoshop write and show such files, with a fourth byte that nobody uses; painted
    over, a whole class would be white."""
    path = tmp_path / f"a{suffix}"
    picture = Image.fromarray(np.dstack([COLOURS, np.zeros_like(GREY)]))
    if suffix == ".tga":
        picture.save(path)
    else:  # Pillow writes no BMP whose fourth byte is called alpha
        pixels = np.dstack([COLOURS[::-1, :, ::-1], np.zeros_like(GREY)]).tobytes()
        masks = [0xFF0000, 0xFF00, 0xFF, 0xFF000000]
        head = struct.pack(
            "<IiiHHIIiiII4I52x", 108, 6, 6, 1, 32, 3, len(pixels), 0, 0, 0, 0, *masks
        )
        path.write_bytes(struct.pack("<2sIII", b"BM", 122 + len(pixels), 0, 122) + head + pixels)
        with Image.open(path) as image:
            assert image.mode == "RGBA"
    assert np.array_equal(pictures.open_image(str(path), 6), COLOURS.transpose(2, 0, 1))


def test_a_png_that_is_nowhere_opaque_is_white(tmp_path):
    """There alpha is never an unused byte."""
    picture = Image.fromarray(np.dstack([COLOURS, np.zeros_like(GREY)]))
    assert (opened(picture, tmp_path / "a.png") == 255).all()


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
    "suffix", [".avif", ".jfif", ".mpo", ".gif", ".webp", ".bmp", ".jp2", ".ico", ".tga"]
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


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    """Pillow's MemoryError has none: a good picture would seem to be a bad one."""
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=MemoryError()))
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="a.png: MemoryError"):
        pictures.open_image(str(tmp_path / "a.png"), 6)


def test_a_very_large_picture_is_a_picture_up_to_a_bound(tmp_path):
    """182 megapixels, where Pillow warns at 89 and refuses at 179. Four gigapixels would need 16 GB
    of memory, and stand in a file of a few bytes."""
    assert (opened(Image.new("L", (13_500, 13_500), 128), tmp_path / "a.jpg") == 128).all()
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 65536 65536 255\n")
    with pytest.raises(ValueError, match="a.pgm.*4294967296 pixels"):
        pictures.open_image(str(path), 6)


def test_a_damaged_note_about_the_camera_costs_no_picture(tmp_path):
    """EXIF that makes no sense is passed over; the pixels are whole."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = opened(Image.new("RGB", (6, 6), (9, 9, 9)), tmp_path / "a.jpg", exif=exif)
    assert (got == 9).all()
    for suffix in (".png", ".webp"):  # Pillow reads theirs with less patience
        for note in (exif[6:], bytes.fromhex("0008000201120003")):
            path = tmp_path / f"b{suffix}"
            assert (opened(Image.new("RGB", (6, 6), (9, 9, 9)), path, exif=note) == 9).all()


@pytest.mark.parametrize(
    "size, S", [((480, 640), 16), ((640, 480), 24), ((333, 777), 10), ((640, 480), 100)]
)
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
        pictures.open_image(str(tmp_path / "a.jpg"), 50)
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
        pictures.open_image(str(path), 8)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
FIELDS = {(3, 60): b"\1\0", (3, 20): b"\11", (3, 30): b"\11", (3, 120): b"\5", (8, 10): POSTSCRIPT}
IPTC = b"".join(bytes([28, *tag, 0, len(value)]) + value for tag, value in FIELDS.items())


@pytest.mark.parametrize("content", [POSTSCRIPT, IPTC], ids=["as it is", "in another format"])
def test_a_postscript_file_that_is_called_jpg_does_not_start_ghostscript(
    content, tmp_path, monkeypatch
):
    """Pillow goes by what is in a file and not by its name; and this one may be a stranger's."""
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'; echo 10.01\n")
    (tmp_path / "gs").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(ValueError, match="holiday.jpg: cannot identify"):
        pictures.open_image(str(path), 8)
    assert not (tmp_path / "started").exists()


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path):
    """A clone without git-lfs holds 130 bytes of text in the place of every picture."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.jpg").write_text(pointer)
    with pytest.raises(ValueError, match="a.jpg.*git lfs pull"):
        pictures.open_image(str(tmp_path / "a.jpg"), 6)


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), seeds)
@example((1, 40), 0)
def test_pictures_of_any_size_become_square(tmp_path_factory, size, seed):
    """(3, S, S), by bicubic scaling of the centre square, the one PIL's own fit cuts."""
    path = tmp_path_factory.mktemp("odd") / "a.png"
    write_picture(path, noise(1, *size, seed)[0])
    with Image.open(path) as image:
        expected = ImageOps.fit(image, (7, 7), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert torch.equal(pictures.open_image(str(path), 7), expected)


@pytest.mark.parametrize("rows, columns", [(slice(2, 8), slice(0, 6)), (slice(0, 6), slice(2, 8))])
def test_a_long_picture_keeps_its_middle_unscaled_if_that_fits(rows, columns, tmp_path):
    """6 x 10 and 10 x 6: two rows or columns go on either side, and nothing is squashed."""
    image = noise(1, rows.stop + rows.start, columns.stop + columns.start, 0)[0]
    write_picture(tmp_path / "a.png", image)
    assert torch.equal(pictures.open_image(str(tmp_path / "a.png"), 6), image[:, rows, columns])


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_taken_with_the_camera_turned_stands_upright(orientation, suffix, tmp_path):
    """The eight values of EXIF's orientation, a mirror and a quarter turn each: PIL's own way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_picture(tmp_path / f"a{suffix}", noise(1, 6, 6, 0)[0], exif=exif)
    with Image.open(tmp_path / f"a{suffix}") as image:
        upright = np.array(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    assert np.array_equal(pictures.open_image(str(tmp_path / f"a{suffix}"), 6), upright)


# ---- 3 Decoding, once ----


def cache_of(root):
    (path,) = root.glob(".cache*")
    return path


def test_the_second_load_decodes_nothing_and_returns_the_same(tmp_path):
    train, test = make_folder(tmp_path)
    first = load_folder(tmp_path)
    with mock.patch.object(pictures, "open_image", side_effect=AssertionError("decoded again")):
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
        assert torch.equal(images, torch.stack([pictures.open_image(str(x), 6) for x in files]))


def test_a_folder_is_decoded_once_by_whatever_path(tmp_path, monkeypatch):
    """Relative, absolute, and moved."""
    make_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert [len(decoded(root)) for root in ("pets", "./pets/", tmp_path / "pets")] == [8, 0, 0]
    os.rename("pets", "animals")
    assert decoded("animals") == []


def test_what_another_decoder_has_kept_is_decoded_again(tmp_path, monkeypatch):
    """Else training would see the pixels of before it was mended, and --images those of after."""
    make_folder(tmp_path)
    load_folder(tmp_path)
    monkeypatch.setattr(pictures, "DECODER", pictures.DECODER + 1)
    n = sum(path.suffix == ".png" for path in tmp_path.rglob("*"))
    assert len(decoded(tmp_path)) == n > 0 and decoded(tmp_path) == []


def test_every_image_size_has_a_cache_of_its_own(tmp_path):
    """Going back to 6 pixels after a run at 9 decodes nothing."""
    make_folder(tmp_path)
    assert [len(decoded(tmp_path, S)) for S in (6, 9, 6, 9)] == [8, 8, 0, 0]
    assert load_folder(tmp_path, 9).train_images.shape == (5, 3, 9, 9)


def test_caches_do_not_pile_up(tmp_path):
    """Pictures come and go for ten runs: there is room for eight, and not for eighteen."""
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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_was_decoded_is_kept_when_the_run_is_killed(tmp_path):
    """A process that dies by SIGKILL at its 61st picture of 120, in the middle of its work."""
    make_part(tmp_path, {"cat": 60, "dog": 60})
    real, count = pictures.open_image, itertools.count()

    def deadly(path, size):
        next(count) == 60 and os.kill(os.getpid(), signal.SIGKILL)
        return real(path, size)

    process = multiprocessing.get_context("fork").Process(target=load_folder, args=(tmp_path,))
    with mock.patch.object(pictures, "open_image", deadly):
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    lost = len(decoded(tmp_path)) - 60
    assert 0 <= lost < 2 * os.cpu_count()  # those in flight
    assert decoded(tmp_path) == []


def test_an_interrupt_stops_the_decoding_at_once_and_keeps_what_is_done(tmp_path):
    """Ctrl-C while the bar moves: the hundreds that wait are not decoded first."""
    make_part(tmp_path, {"cat": 100, "dog": 100})
    real, numbers, begun = pictures.open_image, itertools.count(1), []

    def slow(path, S):
        begun.append(path)
        time.sleep(0.01)
        if next(numbers) == 20:  # once: a second one would interrupt the end of the first
            os.kill(os.getpid(), signal.SIGINT)
        return real(path, S)

    with mock.patch.object(pictures, "open_image", slow), pytest.raises(KeyboardInterrupt):
        load_folder(tmp_path)
    assert len(begun) < 100
    assert len(decoded(tmp_path)) == 200 - len(begun)


def test_all_unreadable_files_are_named_in_one_error_and_the_others_are_kept(tmp_path):
    """Of both parts: three with what is wrong, the others by their paths."""
    make_folder(tmp_path)
    broken = [tmp_path / f"{part}/cat/{i}x.png" for part in ("train", "test") for i in (1, 2, 3)]
    for path in broken:
        path.write_bytes(b"not a picture")
    message = refused(tmp_path)
    assert all(str(path) in message for path in broken)
    assert message.count("cannot read the image") == 3
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
    assert not any(pictures.is_picture(str(path)) for path in tmp_path.glob(".cache*"))


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


@pytest.mark.parametrize("is_cached", [False, True])
def test_loading_needs_less_than_twice_the_memory_of_the_images(is_cached, tmp_path):
    """400 images of 256 pixels: 79 MB of uint8."""
    for i, image in enumerate(noise(400, 8, 8, 0)):
        write_picture(tmp_path / ("train", "test")[i % 2] / "ab"[i // 2 % 2] / f"{i}.bmp", image)
    if is_cached:
        load_folder(tmp_path, 256)
    got, peak = peak_memory(lambda: load_folder(tmp_path, 256))
    size = 400 * 3 * 256 * 256 / 1e6
    assert len(got.train_images) == 200 and peak < 2 * size, f"{peak / size:.2f} times"


def test_the_training_images_can_be_let_go_of(tmp_path):
    """train.py keeps a shuffled copy of them. Slices of one tensor would keep them all the same."""
    make_part(tmp_path / "train", {"cat": 2, "dog": 3})
    for part in ("test", "val"):
        make_part(tmp_path / part, {"cat": 1, "dog": 2})
    dataset = load_folder(tmp_path)
    for images in (dataset.test_images, dataset.val_images):
        assert images.untyped_storage().nbytes() == images.numel()


def test_decoding_starts_no_threads_but_its_own(tmp_path, monkeypatch):
    """In each of them PyTorch would start one a core, to copy a picture of 105 pixels or more."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs Linux's list of threads")

    def others():  # that Python does not know
        return len(os.listdir("/proc/self/task")) - threading.active_count()

    def write_record(*_):
        counts.append(others())

    make_folder(tmp_path, S=128)
    monkeypatch.setattr(pictures, "write_record", write_record)
    torch.set_num_threads(4)
    try:
        torch.zeros(10**6).add_(1)  # the main thread's are there from now on
        counts = [others()]
        load_folder(tmp_path, 128)
    finally:
        torch.set_num_threads(1)
    assert len(counts) == 9 and max(counts) < counts[0] + 3  # a team of four is three more
