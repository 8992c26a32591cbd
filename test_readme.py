"""The README is part of the program: its commands, its table and its exercises are checked here.

`pytest -m slow test_readme.py` makes every "break it" change of the course in a copy of the files,
and demands that the test it names turns red.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train import PRESETS, TrainConfig
from vit import ViTConfig

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BREAK_IT = re.findall(r"in `(\w+\.py)` replace `(.+?)` by `(.+?)`; `(test_\w+)` turns red", README)
FIELDS = {**TrainConfig.__dataclass_fields__, **ViTConfig.__dataclass_fields__}


def test_every_command_of_the_readme_uses_flags_that_exist():
    program = re.findall(r"^.*train\.py.*$", README, re.MULTILINE)
    flags = {flag for line in program for flag in re.findall(r"train\.py.*?(?=[#|`]|$)", line)}
    named = {name for text in flags for name in re.findall(r"--([a-z-]+)", text)}
    assert named - {name.replace("_", "-") for name in FIELDS} <= {"preset", "help"}


def test_every_file_and_test_the_readme_names_exists():
    tests = "".join(path.read_text() for path in ROOT.glob("test_*.py"))
    for name in set(re.findall(r"\btest_[a-z0-9_]{12,}\b", README)):
        assert f"def {name}(" in tests, name
    for path in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_selection_of_the_course_selects_a_test():
    """`pytest FILE -k "a or b"`: each word of the expression occurs in the name of a test of that
    file."""
    chosen = re.findall(r"`pytest (test_\w+\.py) -k (?:\"([^\"]+)\"|(\w+))`", README)
    assert len(chosen) >= 13
    for file, quoted, single in chosen:
        for word in (quoted or single).split(" or "):
            assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), re.MULTILINE), word


def test_the_recipe_table_says_what_the_presets_do():
    rows = re.findall(r"^\| `--([a-z-]+)` \| (\S+) \| (\S+) \|", README, re.MULTILINE)
    assert {name.replace("-", "_") for name, _, _ in rows} >= set(PRESETS["strong"])
    for name, deit, strong in rows:
        name = name.replace("-", "_")
        default = FIELDS[name].default
        for text, value in ((deit, default), (strong, PRESETS["strong"].get(name, default))):
            if isinstance(value, str):
                assert text == value, name
            else:
                numerator, _, denominator = text.partition("/")
                assert float(numerator) / float(denominator or 1) == pytest.approx(value), name


def test_the_course_has_an_exercise_for_every_chapter():
    assert len(BREAK_IT) == len(re.findall(r"^\*\*\d+\. ", README, re.MULTILINE)) >= 13


def test_every_exercise_of_the_course_fits_the_files():
    for file, old, new, _ in BREAK_IT:
        assert (ROOT / file).read_text().count(old) == 1 and old != new, old


@pytest.mark.slow
@pytest.mark.parametrize("file, old, new, test", BREAK_IT, ids=[test for *_, test in BREAK_IT])
def test_breaking_it_as_the_course_says_turns_the_named_test_red(tmp_path, file, old, new, test):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new))
    where = next(path.name for path in ROOT.glob("test_*.py") if f"def {test}(" in path.read_text())
    pytest_quietly = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command = [*pytest_quietly, where, "-k", test]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "failed" in done.stdout, done.stdout  # 1: some tests failed
