"""The README is part of the program: its commands, its table and its exercises are checked here.

`pytest -m slow test_readme.py` makes every "break it" change of the course in a copy of the files,
and demands that the test it names turns red.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from train import PRESETS, TrainConfig
from vit import ViTConfig

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BREAK_IT = re.findall(r"in `(\w+\.py)` replace `(.+?)` by `(.+?)`; `(test_\w+)` turns red", README)
FIELDS = {**TrainConfig.__dataclass_fields__, **ViTConfig.__dataclass_fields__}


def shell_commands():
    """The commands of the README's sh blocks and inline ones, with their variables filled in."""
    variables, commands = {}, re.findall(r"`((?:python|torchrun) [^`]+)`", README)
    for block in re.findall(r"```(?:sh|python)\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            line = line.split("#")[0].strip().removeprefix("!")
            for name, value in variables.items():
                line = line.replace("$" + name, value)
            assignment = re.fullmatch(r'(\w+)="(.*)"', line)
            if assignment:
                variables[assignment[1]] = assignment[2]
            else:
                commands += re.split(r" && |; ", line)
    return [command for command in commands if "train.py" in command]


def test_every_training_command_of_the_readme_is_one_that_train_py_accepts():
    """Flags, presets, types and limits; only what the data or the machine decide is left open."""
    commands = shell_commands()
    assert len(commands) >= 25
    for command in commands:
        words = shlex.split(command)
        argv = words[words.index("train.py") + 1 :]
        if argv != ["--help"]:
            preset, flags = train.parse(argv)
            train.build_configs({**preset, **flags})


def test_the_levers_of_the_ablation_lead_from_deit_to_strong():
    """The last row of the ablation and --optimizer muon: the strong preset, to three digits."""
    command = next(c for c in shell_commands() if "runs/lever-5-averaging" in c)
    _, flags = train.parse(command.split()[2:])
    lever = {k: v for k, v in flags.items() if k in FIELDS and k not in ("out", "max_minutes")}
    lever = {k: v for k, v in lever.items() if k not in ("dataset", "data_dir", "lr")}
    assert lever | {"optimizer": "muon"} == pytest.approx(PRESETS["strong"], abs=5e-5)


def test_the_map_counts_the_lines_of_the_files():
    """Rounded: within twenty of the truth."""
    counts = re.findall(r"^(\w+\.py) +(\d+) lines", README, re.MULTILINE)
    assert len(counts) == 6
    for name, lines in counts:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 20, name


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
    assert len(chosen) >= 14
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
    assert len(BREAK_IT) == len(re.findall(r"^\*\*\d+\. ", README, re.MULTILINE)) >= 14


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
