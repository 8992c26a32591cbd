"""The pages are part of the program: what README, TUTORIAL and RESULTS say is checked here.

`pytest -m slow test_pages.py` makes every "Break it" change of the tutorial in a copy of the files,
and demands that the test it names turns red.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoint
import evaluate
import log
import recipe
import testing
from recipe import PRESETS, TrainConfig
from testing import make_parser
from vit import VisionTransformer, ViTConfig

ROOT = Path(__file__).parent


def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


PAGES = {name: source(ROOT / name) for name in ("README.md", "TUTORIAL.md", "RESULTS.md")}
README, TUTORIAL, RESULTS = PAGES.values()
# With a paragraph on one line, so that a command or an exercise may be wrapped.
FLAT = {name: re.sub(r"(?<!\n)\n(?![\n|])", " ", page) for name, page in PAGES.items()}
FIELDS = {**TrainConfig.__dataclass_fields__, **ViTConfig.__dataclass_fields__}

CHANGE = r"in `(\w+\.py)` replace `(.+?)` by `(.+?)`"
BREAK_IT = re.findall(rf"{CHANGE}; `(test_\w+)` turns red", FLAT["TUTORIAL.md"])
COST = re.findall(
    r"^\| (.+?) \| (.+) \| .+? \|$", TUTORIAL.partition("# What does it cost")[2], re.MULTILINE
)


# --- commands -------------------------------------------------------------------------------------


def blocks(page: str, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", page, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The arguments of every call of a program, in code blocks and inline, variables filled in."""
    calls = []
    for name, page in PAGES.items():
        variables, lines = {}, re.findall(r"`((?:python|torchrun) [^`]+)`", FLAT[name])
        for line in "\n".join(blocks(page, "sh", "ipython")).splitlines():
            line = line.split(" #")[0].strip().removeprefix("!")
            for variable, value in variables.items():
                line = line.replace("$" + variable, value)
            if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assignment[1]] = assignment[2]
            else:
                lines += re.split(r" && |; ", line)
        words = [shlex.split(line) for line in lines if f" {program}" in line]
        calls += [call[call.index(program) + 1 :] for call in words]
    return calls


def test_every_training_command_of_the_pages_is_one_that_train_py_accepts():
    """Flags, presets, types and limits; only what the data or the machine decide is left open."""
    calls = commands("train.py")
    assert len(calls) >= 40
    for argv in calls:
        if argv != ["--help"]:
            preset, flags = recipe.parse(argv, make_parser())
            values = recipe.resolve(preset, flags, None)
            recipe.build_configs(recipe.follow_data(values, n=50_000))


def test_every_evaluation_command_of_the_pages_is_one_that_evaluate_py_accepts(monkeypatch):
    class Accepted(BaseException):
        """It came as far as reading the checkpoint."""

    def load_checkpoint(path):
        raise Accepted

    monkeypatch.setattr(evaluate, "load_checkpoint", load_checkpoint)
    calls = commands("evaluate.py")
    assert len(calls) >= 2
    for argv in calls:
        with pytest.raises(Accepted):
            evaluate.main(argv)


def test_the_levers_of_the_ablation_lead_from_deit_to_strong():
    """Its last row and --optimizer muon are the strong preset, to three digits."""
    [argv] = [argv for argv in commands("train.py") if "runs/lever-5-averaging" in argv]
    _, flags = recipe.parse(argv, make_parser())
    beside = ("out", "max_minutes", "dataset", "data_dir", "lr")
    lever = {name: value for name, value in flags.items() if name not in beside}
    assert lever | {"optimizer": "muon"} == pytest.approx(PRESETS["strong"], abs=5e-5)


# --- tables ---------------------------------------------------------------------------------------


def test_the_recipe_table_says_what_the_presets_do():
    """A column for each preset but the demo, a row for whatever one of them sets."""
    [names] = re.findall(r"^\| option \| (.+) \| why \| source \|$", README, re.MULTILINE)
    names = names.replace("`", "").split(" | ")
    assert set(names) == set(PRESETS) - {"demo"}
    rows = {}
    for line in re.findall(r"^\| `--(.+) \|$", README, re.MULTILINE):
        option, *cells = line.split(" | ")
        rows[option.strip("`").replace("-", "_")] = dict(zip(names, cells))
    in_question = {option for name in names for option in PRESETS[name]}
    assert rows.keys() >= in_question - {"dataset", "device"}
    for option, cells in rows.items():
        for name, text in cells.items():
            value = PRESETS[name].get(option, FIELDS[option].default)
            if isinstance(value, bool):
                assert text == ("yes" if value else "no"), (option, name)
            elif isinstance(value, str):
                assert text == value, (option, name)
            else:
                numerator, _, denominator = text.partition("/")
                number = float(numerator) / float(denominator or 1)
                assert number == pytest.approx(value), (option, name)


def test_the_columns_of_the_log_are_explained_in_their_order():
    table = TUTORIAL.partition("#### The columns of the log")[2].partition("##")[0]
    explained = []
    for cell in re.findall(r"^\| (`.+?`) \| ", table, re.MULTILINE):
        explained += [name.replace("\\", "") for name in re.findall(r"`(.+?)`", cell)]
    assert explained == [title for _, title, *_ in log.COLUMNS if title] + ["left"]


def test_the_map_names_every_file_and_what_it_imports():
    """A file with "all above" imports some of the files above it, the others exactly these."""
    rows = re.findall(r"^\| \[(\w+)\.py\].+?\| [^|]+ \|([^|]*)\|", README, re.MULTILINE)
    files = [name for name, _ in rows]
    rooms = {path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("test")}
    assert set(files) == rooms - {"conftest"}
    for i, (name, imported) in enumerate(rows):
        text = source(ROOT / f"{name}.py")
        found = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) & set(files)
        if imported.strip() == "all above":
            assert found <= set(files[:i]), name
        else:
            assert found == set(imported.replace(",", " ").split()), name


# --- the weights that come with it ----------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, changed", [("laptop", {}), ("laptop-200", {"epochs": 200, "mix_prob": 1})]
)
def test_the_weights_are_of_the_preset_and_the_pages_say_what_they_reached(folder, changed):
    best = checkpoint.load_checkpoint(ROOT / f"assets/{folder}/best.pt")
    recorded, preset = best["train"] | best["vit"], PRESETS["laptop"] | changed
    assert {name: recorded[name] for name in preset} == preset
    metrics = json.loads(source(ROOT / f"assets/{folder}/metrics.json"))
    assert metrics["split"] == "test" and metrics["epoch"] == best["epoch"]
    config, vit_config = recipe.build_configs(preset)
    images = 45_000 // config.batch_size * config.batch_size * config.epochs
    cost = 3 * vit_config.flops_per_image * images / 1e15
    for name, page in FLAT.items():
        assert f"**{100 * metrics['accuracy']:.2f} %**" in page, name
        assert name == "README.md" or f"{cost:.2f} PFLOP" in page, name


def test_the_weights_give_the_answers_that_the_readme_prints(capsys):
    best, cat = ROOT / "assets/laptop/best.pt", ROOT / "assets/cat.jpg"
    assert evaluate.main([str(best), "--images", str(cat)]) == 0
    answers = capsys.readouterr().out.split("cat.jpg")[1].split()
    [printed] = re.findall(r"^assets/cat\.jpg (.+)$", README, re.MULTILINE)
    shares = [float(text.split()[1].rstrip("%")) for text in (" ".join(answers), printed)]
    assert answers[0] == printed.split()[0] == "cat"
    assert shares[0] == pytest.approx(shares[1], abs=1)  # the last digit is the machine's


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_test_that_a_page_names_exists(name):
    files = set(re.findall(r"\b[a-z_]+\.py\b", PAGES[name]))
    files -= {"attention.py", "layers.py", "main.py", "test.py"}  # of other repositories
    files |= set(re.findall(r"\bassets/[\w./-]+\w", PAGES[name]))
    assert [file for file in sorted(files) if not (ROOT / file).exists()] == []
    tests = "".join(source(path) for path in ROOT.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGES[name])
    assert [test for test in named if f"def {test}(" not in tests] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_to_a_file_or_a_heading(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[name]):
        file, _, anchor = target.partition("#")
        assert (ROOT / file).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", PAGES[file or name], re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, target


def test_every_selection_of_the_tutorial_selects_a_test():
    """`pytest FILE -k "a or b"`: each word is part of the name of a test in that file."""
    chosen = re.findall(r"`pytest (test_\w+\.py) -k (?:\"([^\"]+)\"|(\w+))`", FLAT["TUTORIAL.md"])
    assert len(chosen) >= 16
    for file, quoted, single in chosen:
        for word in (quoted or single).split(" or "):
            assert re.search(rf"^def test_\w*{word}", source(ROOT / file), re.MULTILINE), word


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_no_place_of_one_machine_and_leaves_nothing_to_fill_in(name):
    assert re.findall(r"(?<!\w)/(?:root|home|work|tmp|mnt|Users)/", PAGES[name]) == []
    indices = set(re.findall(r"index-url (\S+)", PAGES[name]))
    assert indices <= {"https://download.pytorch.org/whl/cpu"}
    assert re.findall(r"@@\w+@@", PAGES[name]) == []


def test_the_readme_is_short():
    assert len(README.encode()) < 15_000


@pytest.mark.slow
def test_the_pictures_of_the_pages_can_be_drawn_again(tmp_path):
    """From the logs and the weights beside them."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    names = ("pipeline", "schedule", "roofline", "cost", "laptop/biases")
    drawn = [tmp_path / f"assets/{name}.png" for name in names]
    for path in drawn:
        path.unlink()
    subprocess.run([sys.executable, "assets/draw.py"], cwd=tmp_path, check=True)
    assert all(path.exists() for path in drawn)


# --- the tutorial's exercises ---------------------------------------------------------------------


def test_every_chapter_of_the_tutorial_has_an_exercise():
    chapters = re.split(r"^### \d+\. ", TUTORIAL, flags=re.MULTILINE)[1:]
    assert len(chapters) >= 15
    for chapter in chapters:
        assert "*Break it:*" in chapter, chapter.partition("\n")[0]
    assert TUTORIAL.count("*Break it:*") == len(BREAK_IT)


def test_every_exercise_fits_the_files():
    for file, old, new, _ in BREAK_IT:
        assert source(ROOT / file).count(old) == 1 and old != new, old


def test_every_row_of_the_cost_table_can_be_done():
    """It is a change that fits the files, flags that fit the demo, or another chapter's change."""
    assert len(COST) >= 12
    for what, change in COST:
        if edit := re.match(CHANGE, change):
            file, old, new = edit.groups()
            assert source(ROOT / file).count(old) and old != new, what
        elif flags := re.fullmatch(r"`(--.+)`", change):
            preset, typed = recipe.parse(["--preset", "demo", *flags[1].split()], make_parser())
            recipe.build_configs({**preset, **typed})
        elif chapter := re.fullmatch(r"chapter (\d+)'s change", change):
            assert f"### {chapter[1]}. " in TUTORIAL, what
        else:
            assert what in ("what", "---", "nothing"), what


@pytest.mark.slow
@pytest.mark.parametrize("file, old, new, test", BREAK_IT, ids=[test for *_, test in BREAK_IT])
def test_breaking_it_as_the_tutorial_says_turns_the_named_test_red(tmp_path, file, old, new, test):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    text = source(tmp_path / file).replace(old, new)
    (tmp_path / file).write_text(text, encoding="utf-8")
    where = next(path.name for path in ROOT.glob("test_*.py") if f"def {test}(" in source(path))
    pytest_quietly = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command = [*pytest_quietly, where, "-k", test]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "failed" in done.stdout, done.stdout  # 1: some tests failed


# --- use from Python ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_python_of_the_readme_does_what_it_says(here, tiny, monkeypatch):
    """On a run's best.pt, given a fresh network of the default size; what needs timm, where it is.

    timm's model then computes what ours does, and the exported program takes any batch size.
    """
    assert testing.run(out="out") == 0
    best = torch.load("out/best.pt", weights_only=True)
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig()).eval()
    best |= {"vit": asdict(ViTConfig()), "model": model.state_dict(), "classes": list("abcdefghij")}
    Path("runs/deit").mkdir(parents=True)
    for folder in ("out", "runs/deit"):
        checkpoint.save_checkpoint(best, f"{folder}/best.pt")
    for name in ("cat.jpg", "dog.jpg"):
        noise = torch.randint(0, 256, (40, 50, 3), generator=testing.rng(len(name)))
        Image.fromarray(noise.byte().numpy()).save(name)

    has_timm = importlib.util.find_spec("timm") is not None
    if has_timm:
        import timm

        create, created = timm.create_model, []

        def offline(*args, pretrained=False, **options):
            created.append(create(*args, **options))
            return created[-1]

        monkeypatch.setattr(timm, "create_model", offline)
    images, seen = torch.randn(3, 3, 32, 32, generator=testing.rng(0)), {}
    for block in blocks(README, "python"):
        if "timm" in block and not has_timm:
            continue
        exec(block, seen)
        if "img_size=32" in block:
            with torch.no_grad():
                torch.testing.assert_close(seen["model"](images), model(images))
        if "image_size=224" in block:
            large = torch.randn(1, 3, 224, 224, generator=testing.rng(1))
            with torch.no_grad():
                torch.testing.assert_close(seen["model"](large), created[-1](large))
    assert seen["probabilities"].shape == (2, 10)
    loaded = torch.export.load("vit.pt2").module()
    torch.testing.assert_close(loaded(images), model(images))
