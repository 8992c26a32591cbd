"""
The specification of recipe.py: what a knob may be, what the presets set, what the command line
understands, and who wins when several have a say.

Nothing here trains: that each knob changes the outcome of a run is a law of test_train.py.
"""

import dataclasses
import inspect
import math
import re
from dataclasses import asdict, fields
from typing import get_args

import pytest

import recipe
from recipe import PRESETS, TrainConfig, build_configs, follow_data, parse, resolve
from testing import make_parser, refusal
from vit import ViTConfig

TRAIN = {knob.name: knob for knob in fields(TrainConfig)}
KNOBS = TRAIN | {knob.name: knob for knob in fields(ViTConfig)}
# What a run knows and a user does not choose: pictures have three colours, and the data classes.
NO_FLAG = ("in_channels", "num_classes")
OTHER = {  # another value for every flag
    "dataset": "shapes",
    "data_dir": "moved",
    "download_url": "http://mirror",
    "val_size": 7,
    "out": "elsewhere",
    "resume": True,
    "max_minutes": 1.5,
    "eval_every": 2,
    "save_every": 2,
    "seed": 1,
    "device": "cpu",
    "dtype": "bfloat16",
    "compile": False,
    "deterministic": True,
    "epochs": 400,
    "batch_size": 512,
    "optimizer": "muon",
    "lr": 0.125,
    "weight_decay": 0.5,
    "pct_start": 0.6,
    "grad_clip": 0.5,
    "label_smoothing": 0.1,
    "ema_decay": 0.5,
    "crop": "none",
    "randaugment_ops": 1,
    "randaugment_magnitude": 20,
    "randaugment_prob": 0.5,
    "randaugment_fill": "mean",
    "mixup": 0.5,
    "cutmix": 0.5,
    "mix_prob": 0.5,
    "mix_until": 0.5,
    "image_size": 64,
    "patch_size": 8,
    "dim": 96,
    "depth": 3,
    "heads": 6,
    "mlp_ratio": 2.0,
    "dropout": 0.25,
    "attn_dropout": 0.25,
    "drop_path": 0.25,
    "pool": "mean",
    "relative_position_bias": True,
}


def flag(name):
    return "--" + name.replace("_", "-")


def kind(name):
    """The type of a knob: of `float | None`, float."""
    return (get_args(KNOBS[name].type) or (KNOBS[name].type,))[0]


def values_of(argv):
    """What a new run with this command line is built from."""
    return resolve(*parse(argv.split(), make_parser()), None)


def saved_run(**values):
    """All values of a run, as its checkpoint keeps them."""
    config, vit_config = build_configs(values)
    train = {k: v for k, v in asdict(config).items() if k not in ("out", "resume", "max_minutes")}
    return {**train, **asdict(vit_config)}


def resumed(saved, **typed):
    """The configs of a run that is continued with these flags."""
    return build_configs(resolve({}, typed, saved))


# ---- Knobs and their limits ----


def test_the_default_recipe_is_deits_for_cifar10():
    """300 epochs of DeiT-Ti; 5,000 of 50,000 images are held out."""
    assert TrainConfig().val_size is None  # a tenth
    config, network = build_configs(follow_data({}, 50_000))
    assert (config.dataset, config.epochs, config.val_size) == ("cifar10", 300, 5_000)
    assert (config.optimizer, config.weight_decay, config.batch_size) == ("adamw", 0.05, 1024)
    assert config.lr == pytest.approx(5e-4 * 1024 / 512) and config.pct_start == 0.3
    assert (config.randaugment_ops, config.randaugment_magnitude) == (2, 9)
    assert (config.randaugment_prob, config.crop, config.randaugment_fill) == (1, "pad", "black")
    assert (config.mixup, config.cutmix, config.mix_prob, config.mix_until) == (1, 1, 1, 1)
    assert (config.label_smoothing, config.ema_decay, config.grad_clip) == (0, 0, 0)
    assert (network.image_size, network.patch_size, network.dim) == (32, 4, 192)
    assert (network.depth, network.heads, network.pool) == (12, 3, "cls")
    assert (network.dropout, network.attn_dropout, network.drop_path) == (0.1, 0.0, 0.0)


SIZE = ("at least 1", (1, 10**9), (0, -3, math.inf, math.nan))
AMOUNT = ("at least 0 and finite", (0, 1e9), (-1, -1e-9, math.inf, math.nan))
POSITIVE = ("positive and finite", (1e-9, 1e9), (0, -0.1, math.inf, math.nan))
SHARE = ("between 0 and 1", (0, 1), (-1e-9, 1.5, math.nan))
PART = ("at least 0 and below 1", (0, 0.999), (-1e-9, 1, math.nan))
LIMITS = {  # what the message says, the values at the edge that work, values that do not
    **dict.fromkeys(("val_size", "epochs", "batch_size", "eval_every", "save_every"), SIZE),
    **dict.fromkeys(("weight_decay", "grad_clip", "mixup", "cutmix", "randaugment_ops"), AMOUNT),
    **dict.fromkeys(("lr", "max_minutes"), POSITIVE),
    **dict.fromkeys(("randaugment_prob", "mix_prob", "mix_until"), SHARE),
    **dict.fromkeys(("pct_start", "label_smoothing", "ema_decay"), PART),
    "randaugment_magnitude": ("between 0 and 30", (0, 30), (-1, 31, math.nan)),
    "seed": ("at least 0 and below 2^32", (0, 2**32 - 1), (-1, 2**32)),  # torch: seed 0 again
}


def test_every_number_has_limits():
    assert set(LIMITS) == {name for name in TRAIN if kind(name) in (int, float)}


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_on_its_limit_works_and_one_beyond_it_is_refused_by_name(name):
    text, good, bad = LIMITS[name]
    unmixed = {"mixup": 0, "cutmix": 0} if name == "batch_size" else {}
    for value in good:
        assert getattr(TrainConfig(**{name: value}, **unmixed), name) == value
    for value in bad:
        found = refusal(TrainConfig, **{name: value}, **unmixed)
        assert found == f"{name} must be {text}, got {value}"


@pytest.mark.parametrize(
    "name, choices",
    [
        ("dataset", "cifar10, cifar100, folder or shapes"),
        ("optimizer", "adamw or muon"),
        ("crop", "pad, resized or none"),
        ("randaugment_fill", "black or mean"),
        ("dtype", "auto, float32, bfloat16 or float16"),
    ],
)
def test_a_choice_is_one_of_a_few_and_the_refusal_names_them(name, choices):
    for choice in re.split(", | or ", choices):
        assert getattr(TrainConfig(**{name: choice}), name) == choice
    assert refusal(TrainConfig, **{name: "red"}) == f'{name} must be {choices}, got "red"'


def test_a_batch_of_one_is_refused_exactly_where_batches_are_mixed():
    """mixup and cutmix mix two images; a batch of one has no second."""
    for mixing in ({}, {"mixup": 0}, {"cutmix": 0}, {"mix_prob": 0.1, "mix_until": 0.1}):
        text = refusal(TrainConfig, batch_size=1, **mixing)
        assert "batch_size 1 " in text and "--mixup 0 --cutmix 0" in text
        TrainConfig(batch_size=2, **mixing)
    for unmixed in ({"mixup": 0, "cutmix": 0}, {"mix_prob": 0}, {"mix_until": 0}):
        TrainConfig(batch_size=1, **unmixed)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0


# ---- Presets ----


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_real_knobs_to_other_values_that_work(preset):
    """Where a value is the default's, the line would only seem to say something."""
    for name, value in PRESETS[preset].items():
        assert type(value) is kind(name) and value != KNOBS[name].default, name
    build_configs(PRESETS[preset])


def test_deit_is_the_defaults():
    assert PRESETS["deit"] == {} and values_of("") == values_of("--preset deit") == {}


def test_the_demo_needs_neither_a_download_nor_a_gpu():
    config, _ = build_configs(PRESETS["demo"])
    assert (config.dataset, config.device) == ("shapes", "cpu")


# ---- The command line ----


@pytest.mark.parametrize("name", OTHER)
def test_every_knob_has_a_flag_that_sets_it_and_nothing_else(name):
    value = OTHER[name]
    words = [flag(name), str(value)]
    if kind(name) is bool:
        words = [flag(name) if value else flag(f"no_{name}")]
    preset, flags = parse(words, make_parser())
    assert preset == {} and flags == {name: value} and type(flags[name]) is kind(name)
    assert set(OTHER) == set(KNOBS) - set(NO_FLAG)
    config, network = build_configs(resolve(preset, flags, None))
    assert {**asdict(config), **asdict(network)}[name] == value != KNOBS[name].default


def test_a_switch_can_be_set_either_way_and_is_otherwise_left_open():
    for argv, expected in {"--compile": True, "--no-compile": False}.items():
        assert values_of(argv) == {"compile": expected}
    assert "compile" not in values_of("")


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch):
    """As in --out=~/x; a folder of the name ~ would be dangerous to remove."""
    monkeypatch.setenv("HOME", "ann")
    assert values_of("--out=~/x --data-dir=~/y") == {
        "out": "ann/x",
        "data_dir": "ann/y",
    }


def test_without_arguments_of_its_own_parse_reads_those_of_the_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "7"])
    assert parse(None, make_parser()) == ({}, {"epochs": 7})


@pytest.mark.parametrize(
    "argv, text",
    [
        ("--layers 3", "unrecognized arguments: --layers 3"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),  # no abbreviations: they may collide
        ("--num-classes 7", "unrecognized arguments: --num-classes 7"),
        ("--in-channels 1", "unrecognized arguments: --in-channels 1"),
        ("--resume yes", "unrecognized arguments: yes"),
        ("train.pt", "unrecognized arguments: train.pt"),
        ("--epochs " + 400 * "9", "--epochs: too large"),
        ("--dim 4294967297", "--dim: too large"),
        ("--epochs three", "--epochs: invalid int value: 'three'"),
        ("--batch-size 8.5", "--batch-size: invalid int value: '8.5'"),
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--epochs", "--epochs: expected one argument"),
        ("--preset huge", "--preset: invalid choice: 'huge'"),
    ],
)
def test_a_flag_that_is_unknown_or_of_the_wrong_type_is_one_line_and_exit_code_two(
    argv, text, capsys
):
    with pytest.raises(SystemExit) as end:
        parse(argv.split(), make_parser())
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert end.value.code == 2 and text in line and not out


def help_text():
    """--help, on a terminal so wide that a reason stays on its line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "500")
        return make_parser().format_help()


def test_help_lists_every_knob_with_its_default_and_its_reason():
    """One text to keep true: the comment beside the field is its help, word by word. A default of
    None would say nothing."""
    text = " ".join(help_text().split())
    for config in (TrainConfig, ViTConfig):
        lines = inspect.getsource(config).splitlines()
        for knob in fields(config):
            if knob.name not in NO_FLAG:
                [source] = [line for line in lines if line.startswith(f"    {knob.name}: ")]
                reason = re.escape(source.split("  # ")[1])
                if knob.default is not None:
                    reason += re.escape(f" (default: {knob.default})")
                assert re.search(rf"{flag(knob.name)}(, --no-\S+| [A-Z]+) {reason}", text), reason
    assert "None" not in text
    assert "FLOAT OneCycleLR: share of the steps in which the rate rises (default: 0.3)" in text
    assert "pad (by 1/8 and cut), resized (80 to 100 % of the area) or none (default: pad)" in text


def test_help_opens_with_what_the_program_does_and_not_with_a_list_of_flags():
    first, *rest = help_text().splitlines()
    assert first == "Train a Vision Transformer from scratch."
    assert "usage" not in help_text() and "default: deit" in "".join(rest)


def test_help_stands_under_headings_in_the_order_of_the_fields():
    """A knob's heading is the comment above its group in the source."""
    text = help_text()
    headings = ["data", "run", "optimization", "augmentation", "network"]
    found = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert [heading for heading in found if heading != "options"] == headings
    parts = dict(zip(found, re.split(r"^\w+:$", text, flags=re.MULTILINE)[1:]))
    first = {"data": "dataset", "run": "out", "optimization": "epochs", "augmentation": "crop"}
    for heading, name in (first | {"network": "image_size"}).items():
        assert parts[heading].split()[0] == flag(name)
    assert re.findall(r"^  (--\w\S+?),? ", "".join(parts[h] for h in headings), re.MULTILINE) == [
        flag(name) for name in KNOBS if name not in NO_FLAG
    ]


# ---- What was typed, the preset, the defaults; and what was saved ----


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults():
    values = values_of("--preset demo --epochs 3 --no-compile --dim 32")
    config, network = build_configs(values)
    assert (config.epochs, config.compile, network.dim) == (3, False, 32)
    assert (config.dataset, network.depth) == ("shapes", 4)
    assert config.weight_decay == TrainConfig().weight_decay
    assert PRESETS["demo"]["epochs"] == 25  # looked at, not written to


@pytest.mark.parametrize(
    "argv, lr",
    [
        ("", 1e-3),
        ("--batch-size 512", 5e-4),
        ("--batch-size 2048", 2e-3),
        ("--batch-size 4096 --lr 0.002", 0.002),
        ("--preset strong --batch-size 512", 2e-3),
        ("--preset demo --batch-size 25", 2.5e-3),
        ("--preset demo", 5e-3),
        ("--batch-size 308", 1e-3 * 308 / 1024),  # just above the floor
        ("--batch-size 300", 3e-4),
        ("--batch-size 2", 3e-4),
        ("--lr 0.5", 0.5),
        ("--lr 1e-5 --batch-size 8", 1e-5),
    ],
)
def test_the_learning_rate_scales_with_the_batch_unless_it_is_given(argv, lr):
    """DeiT's linear rule: lr / batch stays that of the preset, down to 3e-4."""
    assert build_configs(values_of(argv))[0].lr == pytest.approx(lr, rel=1e-12)


def test_the_floor_of_the_learning_rate_raises_no_preset_above_its_own():
    """A preset of 1e-4 is not tripled because its batch was halved."""
    preset = {"lr": 1e-4, "batch_size": 64}
    assert resolve(preset, {"batch_size": 32}, None)["lr"] == 1e-4
    assert resolve(preset, {"batch_size": 128}, None)["lr"] == pytest.approx(2e-4)


# Where a run is, for how long, and on what; and the two knobs that may rescue one that diverged.
SITTING = ("out", "resume", "max_minutes")
FREE = ("data_dir", "download_url", "save_every", "device", "compile", "lr", "grad_clip", "dtype")


@pytest.mark.parametrize("name", [name for name in OTHER if name not in (*SITTING, *FREE)])
def test_resume_refuses_a_flag_that_contradicts_the_run_by_its_name(name):
    """Both values are in the text, and what to do."""
    saved, value = saved_run(), OTHER[name]
    text = refusal(resolve, {}, {"resume": True, name: value}, saved)
    assert text.startswith(f"{flag(name)} {value} contradicts the run to resume")
    assert f"which has {saved[name]}: leave it out" in text


@pytest.mark.parametrize("name", FREE)
def test_resume_takes_another_value_where_that_does_no_harm(name):
    """Nothing else changes with it, and without the flag the saved value stays."""
    saved = saved_run(**{name: OTHER[name]})
    assert resumed(saved) == build_configs(saved)
    default = KNOBS[name].default
    assert resumed(saved, **{name: default}) == build_configs({**saved, name: default})


def test_resume_takes_the_place_and_the_time_from_the_command_line():
    """They are not in the checkpoint: a folder may have been moved."""
    typed = {"out": "moved", "resume": True, "max_minutes": 5.0}
    assert resumed(saved_run(), **typed) == build_configs({**saved_run(), **typed})


def test_repeating_what_the_run_was_started_with_is_no_contradiction():
    """The same command with --resume behind it is the command that continues."""
    for argv in ("--preset strong --epochs 9 --dim 96", "--preset demo --batch-size 25"):
        values = values_of(argv)
        saved = saved_run(**follow_data(values, 50_000))
        preset, flags = parse([*argv.split(), "--resume"], make_parser())
        values = resolve(preset, flags, saved)
        assert build_configs(values) == build_configs({**saved, "resume": True})


def test_a_saved_learning_rate_is_not_scaled_again_by_a_repeated_batch_size():
    saved = saved_run(batch_size=512, lr=0.004)
    assert resolve({}, {"batch_size": 512}, saved)["lr"] == 0.004


def test_a_contradiction_of_the_preset_is_not_blamed_on_a_flag():
    text = refusal(resolve, PRESETS["demo"], {"resume": True}, saved_run(dataset="shapes"))
    assert re.match(r"--[a-z-]+ \S+ of the --preset contradicts the run to resume", text)


def test_a_preset_that_is_repeated_leaves_a_changed_rate_alone():
    """--resume --lr has set it; a later --resume --preset of the same name is no wish for more."""
    saved = saved_run(**PRESETS["demo"]) | {"lr": 1e-5, "grad_clip": 0.5}
    values = resolve(PRESETS["demo"], {"resume": True}, saved)
    assert (values["lr"], values["grad_clip"]) == (1e-5, 0.5)


def test_that_a_run_cannot_be_prolonged_is_explained():
    """Its schedule ends at a rate of nearly zero: more epochs would have to start it anew."""
    text = refusal(resolve, {}, {"epochs": 400}, saved_run())
    assert "learning rate ends with the last epoch" in text and "--out" in text
    assert "learning rate ends" not in refusal(resolve, {}, {"seed": 4}, saved_run())


def test_a_run_of_another_version_is_refused_if_it_has_a_knob_that_is_unknown_here():
    """And one that lacks a younger knob has its default."""
    saved = {**saved_run(), "warmup": 3, "angle": 1}
    text = refusal(resolve, {}, {"resume": True}, saved)
    assert "another version" in text and "angle, warmup" in text
    older = saved_run()
    del older["mix_prob"]
    assert resumed(older, mix_prob=1.0) == resumed(older) == build_configs(saved_run())
    assert "--mix-prob 0.5 contradicts" in refusal(resolve, {}, {"mix_prob": 0.5}, older)


# ---- What follows from the data ----


@pytest.mark.parametrize(
    "n", [2, 3, 7, 11, 20, 60, 300, 511, 512, 9_999, 10_000, 11_111, 11_112, 50_000, 10**6]
)
@pytest.mark.parametrize("own_val", [0, 5])
def test_the_defaults_follow_the_data(n, own_val):
    """A tenth is held out (of a few dozen a quarter), at least one. The batch is the largest power
    of two from 8 to 1024 that leaves 32 steps an epoch, and never more than there are images."""
    values = follow_data({}, n, own_val)
    rest = n if own_val else n - values["val_size"]
    assert values["val_size"] == (own_val or max(math.floor(n / 10), min(math.floor(n / 4), 20), 1))
    fitting = [b for b in (8, 16, 32, 64, 128, 256, 512, 1024) if b * 32 <= rest]
    assert values["batch_size"] == min(max([8, *fitting]), rest) >= 1
    assert values["lr"] == pytest.approx(max(1e-3 * values["batch_size"] / 1024, 3e-4))
    assert values.get("epochs") == (100 if rest < 10_000 else None)


def test_a_share_to_hold_out_is_refused_where_the_data_bring_their_own_images_for_it():
    assert "bring 5 validation images" in refusal(follow_data, {"val_size": 7}, 60, 5)
    assert follow_data({"val_size": 5}, 60, 5)["val_size"] == 5


def test_a_handful_of_pictures_is_enough_for_a_run_without_a_further_flag():
    """From three on, with one to learn from and one to mix it with. Of two, one is held out: the
    refusal says how to go on."""
    for n in range(3, 100):
        build_configs(follow_data({}, n), 2)
    assert "--mixup 0 --cutmix 0" in refusal(build_configs, follow_data({}, 2), 2)
    build_configs(follow_data({"mixup": 0, "cutmix": 0}, 2), 2)


@pytest.mark.parametrize("name, value", [("val_size", 7), ("epochs", 5), ("lr", 0.5)])
def test_what_was_typed_or_preset_does_not_follow_the_data(name, value):
    free, held = follow_data({}, 60), follow_data({name: value}, 60)
    assert free[name] != value == held[name] and held.keys() == free.keys()


def test_a_batch_that_was_typed_keeps_its_rate():
    """resolve() has scaled it already, from the preset's own."""
    assert follow_data({"batch_size": 16, "lr": 0.1}, 60)["lr"] == 0.1
    assert follow_data({"batch_size": 16}, 60)["batch_size"] == 16


def test_the_values_that_came_in_are_left_as_they_were():
    values = {"epochs": 3}
    follow_data(values, 60)
    assert values == {"epochs": 3}


def test_holding_everything_out_is_not_blamed_on_the_batch():
    """data.split says what is wrong; a batch of none or one would be refused before it."""
    for val_size in (60, 100):
        config, _ = build_configs(follow_data({"val_size": val_size}, 60))
        assert config.val_size == val_size


def test_one_dictionary_becomes_both_configs():
    config, network = build_configs({"lr": 0.5, "dim": 96, "pool": "mean"})
    assert config == TrainConfig(lr=0.5) and network == ViTConfig(dim=96, pool="mean")
    assert build_configs({}, 7)[1].num_classes == 7 and build_configs({})[1].num_classes == 10


@pytest.mark.parametrize(
    "values, text",
    [
        ({"lr": -1.0}, "lr must be positive and finite, got -1.0"),
        ({"image_size": 30}, "image_size 30 is not divisible by patch_size 4"),
        ({"dim": 100}, "dim 100 is not divisible by heads 3"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, text):
    assert refusal(build_configs, values) == text


# ---- Hours on a CPU ----


def hours(epochs, n, network=None):
    """A step is three forward passes; a CPU does 1e11 operations a second."""
    return epochs * n * 3 * (network or ViTConfig()).flops_per_image / 1e11 / 3600


def test_more_than_an_hour_on_a_cpu_that_nobody_asked_for_is_refused():
    """With what it would take, in numbers, and the ways to go on."""
    config, network = TrainConfig(), ViTConfig()
    text = refusal(recipe.refuse_hours, config, network, "cpu", 45_000)
    # 300 epochs x 45,000 images x 3 passes x 730 MFLOP; that over 1e11 a second
    assert "300 epochs of 45,000 images are 3.0e+16 floating-point operations" in text
    assert "about 3.4 days" in text
    for way in ("--preset demo", "--preset laptop", "--device cpu"):
        assert way in text
    assert f"{hours(20, 45_000):.1f} hours" in refusal(
        recipe.refuse_hours, TrainConfig(epochs=20), network, "cpu", 45_000
    )


def test_of_a_resumed_run_only_the_epochs_that_are_left_are_counted():
    """A GPU's run may be finished, or only looked at, on a machine without one."""
    config, network = TrainConfig(), ViTConfig()
    text = refusal(recipe.refuse_hours, config, network, "cpu", 45_000, done=280)
    assert "20 epochs of" in text and f"about {hours(20, 45_000):.1f} hours" in text
    recipe.refuse_hours(config, network, "cpu", 45_000, done=300)


def test_an_hour_is_no_reason_to_stop_and_neither_is_an_accelerator_or_a_wish():
    network = ViTConfig()
    for other in (network, ViTConfig(dim=96, depth=6), ViTConfig(64)):
        n = math.floor(45_000 / hours(1, 45_000, other))  # in one epoch, an hour
        recipe.refuse_hours(TrainConfig(epochs=1), other, "cpu", n - 1)
        refusal(recipe.refuse_hours, TrainConfig(epochs=1), other, "cpu", n + 1)
    recipe.refuse_hours(TrainConfig(), network, "cuda", 45_000)
    recipe.refuse_hours(TrainConfig(device="cpu"), network, "cpu", 45_000)
