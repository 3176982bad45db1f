"""The command line: what its words mean wherever they stand, and one line for what does not fit."""

import dataclasses
import math
import types
import typing

import pytest
from command_line import call, one_line, parse

from jaxrobust.app import commands
from jaxrobust.app.config import (
    CurvatureConfig,
    Evaluation,
    InputError,
    OptimizerConfig,
    RunConfig,
    distinct,
)
from jaxrobust.app.datasets import SHAPES, check_perturbations
from jaxrobust.app.execution import Execution, Feed
from jaxrobust.app.measurements import robustness, sharpness, steps, theory
from jaxrobust.app.recipe import RECIPES
from jaxrobust.losses import RobustLossConfig


@pytest.mark.parametrize("words", [
    ("road_small/robust", "--data", "folder:X", "--image-size", "20", "30"),
    ("--data", "folder:X", "--image-size", "20", "30", "road_small/robust"),
    ("--data", "folder:X", "road_small/robust", "--image-size", "20", "30"),
    ("--image-size", "20", "30", "--data=folder:X", "road_small"),
])
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_the_recipe_is_found_wherever_it_stands(command, words):
    parsed = parse([command, *words])
    assert parsed.recipe.partition("/")[0] == "road_small"
    assert parsed.run == dataclasses.replace(
        RECIPES["road_small"].rows["robust"], dataset="folder:X", image_size=(20, 30))


def test_a_value_that_is_a_recipes_name_too_is_not_taken_for_the_recipe():
    run = parse(["train", "--data", "digits", "cifar10/both"]).run
    assert run == dataclasses.replace(RECIPES["cifar10"].rows["both"], dataset="digits")


@pytest.mark.parametrize("words, said", [
    (("train",), "Expected a recipe, such as train digits/both, got none."),
    (("train", "--epochs", "3"), "Expected a recipe, such as train digits/both, got none."),
    (("sweep", "--over", "noise_std=0.1"), "Expected a recipe, such as sweep digits/both"),
    (("train", "--epochs", "3", "digit/both"), "Unknown recipe 'digit'. Did you mean 'digits'?"),
    (("train", "digits/bot"), "Unknown row 'bot'. Did you mean 'both'?"),
    (("train", "digits/both", "--epoch", "3"), "Unknown option --epoch of train. Did you mean "
     "--epochs? See python -m experiments train --help."),
    (("evaluate", "x", "--num-draw=3"), "Unknown option --num-draw of evaluate. Did you mean "
     "--num-draws?"),
    (("train", "digits/both", "--epochs", "three"), "Expected --epochs INT. See"),
    (("train", "digits/both", "--epochs"), "Missing value for argument '--epochs'"),
    (("train", "digits/both", "more"), "Unexpected words: more."),
    (("trian", "digits"), "Unknown command 'trian'. Did you mean 'train'?"),
    (("predict",), "Missing from python -m experiments predict"),
    ((), "Expected a command, got none. See python -m experiments --help."),
    (("train", "digits/both", "--seeds", "0,0"), "Expected each seed once, got 0 twice."),
    (("sweep", "digits", "--seeds", "0,x"), "Expected --seeds {None}|INT[,INT...]"),
    (("reproduce", "digits", "--seeds", "0", "0"), "Expected each seed once, got 0 twice."),
    (("reproduce", "digits", "--seeds", "-1"), "Expected seed=-1 in [0, 4294967296)."),
    (("reproduce", "digits", "--jobs", "0"), "Expected jobs=0 in [1, inf)."),
    (("reproduce", "digits", "--rows", "both", "both"), "Expected each row once, got both twice."),
    (("train", "digits/both", "--seed", "4294967296"), "Expected seed=4294967296 in [0,"),
    (("train", "digits/both", "--noise-std", "40"), "Expected noise_std=40.0 in [0, 1], in pixel "
     "values of [0, 1]. Did you mean 40/255, which is 0.157?"),
    (("train", "digits/both", "--perturb", "gaussian(40)"),
     "Expected std=40 in [0, 1], in pixel values of [0, 1]. Did you mean 40/255?"),
    (("evaluate", "x", "--perturb", "identity+uniform(amplitude=8)"), "Did you mean 8/255?"),
    (("evaluate", "x", "--noise-levels", "10", "10"), "Expected each noise level once, got 10.0"),
    (("evaluate", "x", "--noise-levels", "0.06"), "in units of 1/255 of the pixel range. Did you "
     "mean 15.3, which is 0.06 in pixel values of [0, 1]?"),
    (("evaluate", "x", "--noise-levels", "256"), "Expected noise level=256 in [0, 255], in units"),
    (("evaluate", "x", "--noise-levels"), "Expected number of noise levels=0 in [1, inf)."),
    (("curvature", "x", "--step", "2"), "Expected step=2 in (0, 1], in pixel values of [0, 1]."),
    (("steps", "x", "--steps", "0.1", "25"), "Expected steps=25 in (0, 1], in pixel values"),
    (("train", "digits/both", "--feature-layer", "dens"), "Did you mean 'dense'?"),
    (("train", "digits/both", "--width", "100000000"), "Expected width=100000000 in [1, 65536)."),
    (("train", "digits/both", "--coordinator", "host:99999", "--num-processes", "2",
      "--process-id", "0"), "Expected the port of the coordinator=99999 in [1, 65536)."),
    (("evaluate", "x", "--num-draws", "0"), "Expected num_draws=0 in [1, inf)."),
    (("evaluate", "x", "--tsne-images", "-3"), "Expected tsne_images=-3 in [1, inf)."),
    (("curvature", "x", "--test-size", "0"), "Expected test_size=0 in [1, inf)."),
    (("perturb", "x.png", "--perturb"), "Expected number of perturbations=0 in [1, inf)."),
    (("perturb", "x.png", "--image-size", "0", "5"), "Expected image_size=(0, 5) as a height"),
    (("train", "digits/both", "--epochs", "2", "--optimizer.warmup-epochs", "2"),
     "Expected optimizer.warmup_epochs=2 below epochs=2: the warm-up must end within"),
])
def test_words_that_do_not_fit_are_one_line(words, said, capsys):
    assert call(*words) == 2
    assert said in one_line(capsys)


def test_seeds_are_read_alike_by_all_commands():
    for words in (("train", "digits"), ("sweep", "digits"), ("reproduce", "digits")):
        assert parse([*words, "--seeds", "0,1"]).seeds == (0, 1)
        assert parse([*words, "--seeds", "2", "3,5"]).seeds == (2, 3, 5)


def test_the_help_is_of_the_recipe_that_is_named(capsys):
    for words, epochs in ((["train", "--help"], 60), (["train", "--help", "road_small"], 70)):
        with pytest.raises(SystemExit) as stop:
            parse(words)
        assert not stop.value.code
        assert f"(default: {epochs})" in capsys.readouterr().out


def test_a_warmup_that_would_not_end_keeps_its_share_of_the_epochs(capsys):
    # digits warms up for 2 of 60 epochs: of 2 epochs that is 2 * 2 / 60.
    run = parse(["train", "--epochs", "2", "digits/both"]).run
    assert run.epochs == 2 and run.optimizer.warmup_epochs == pytest.approx(1 / 15)
    assert "Warm-up of 0.067 epochs instead of 2" in capsys.readouterr().out
    # What fits stays, and what is asked for is done.
    assert parse(["train", "digits/both", "--epochs", "3"]).run.optimizer.warmup_epochs == 2
    run = parse(["train", "digits", "--epochs", "2", "--optimizer.warmup-epochs", "1"]).run
    assert run.optimizer.warmup_epochs == 1
    assert not capsys.readouterr().out


@pytest.mark.parametrize("command", [
    ("train", "digits/both", "--perturb", "occlusion(2,9)"),
    ("train", "digits/both", "--perturb", "saturate(2)"),
    ("train", "road_small/both", "--data", "folder:nowhere", "--image-size", "20", "30",
     "--perturb", "gaussian(0.1)+stripes(1,31)"),
])
def test_a_perturbation_that_does_not_fit_is_refused_before_the_images_are_opened(
        command, monkeypatch, capsys):
    monkeypatch.setattr(commands, "open_dataset", None)
    assert call(*command) == 2
    assert f"It is in perturbation={command[-1]!r}, for images of" in one_line(capsys)


def test_the_sizes_of_images_are_known_beforehand(digits):
    assert digits.train.images.shape[1:] == SHAPES["digits"]
    config = RECIPES["cifar10"].rows["both"]
    check_perturbations(config, ("occlusion(1,32)",))
    with pytest.raises(InputError, match="height >= 33, that of a mask, got 32"):
        check_perturbations(config, ("occlusion(1,33)",))


def test_distinct_names_what_is_there_twice():
    distinct("step", (1, 2, 3))
    with pytest.raises(InputError, match="Expected each step once, got 2 twice."):
        distinct("step", (1, 2, 3, 2))


SETTINGS = (
    RECIPES["digits"].rows["both"], OptimizerConfig(), RobustLossConfig(), CurvatureConfig(),
    Evaluation(noise_levels=(0.0, 2.0)), robustness.FigureSettings(), steps.StepSettings(),
    sharpness.SharpnessSettings(), theory.TheorySettings(), Execution(), Feed(),
    RunConfig(select="last", optimizer=OptimizerConfig(schedule="cosine")))


def wrong_values():
    """Of each numeric field: what is no number, infinite, negative, and what is there twice."""
    for settings in SETTINGS:
        kind = type(settings)
        for name, hint in typing.get_type_hints(kind).items():
            optional = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            for one in optional:
                inner = typing.get_args(one)[0] if typing.get_origin(one) is tuple else one
                values = {float: (math.nan, math.inf, -math.inf, -1.0), int: (-1,)}.get(inner, ())
                for value in values:
                    yield settings, name, (value,) if inner is not one else value
                if inner is not one and Ellipsis in typing.get_args(one) and inner in (int, float):
                    yield settings, name, (inner(4), inner(4))


CHECKED_LATER = {
    # Against the images that there are.
    "train_size", "validation_size", "batch_size", "test_size", "num_images", "curvature_images",
    "tsne_images", "surface_images",
    # Work that can be stopped, in memory that does not grow with it.
    "num_draws", "num_probes", "curvature_probes", "smoothing_draws", "smoothed_draws",
    # No array is of that size; what is never reached does nothing.
    "steps_per_call", "checkpoint_steps",
    # With a coordinator alone.
    "num_processes", "process_id",
}


def test_sizes_that_no_machine_has_are_refused_at_the_door():
    passed = set()
    for settings in SETTINGS:
        for name, hint in typing.get_type_hints(type(settings)).items():
            huge = {int: 2**50, tuple[int, int]: (2**50, 1), tuple[int, ...]: (2**50,)}
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            for value in (huge[kind] for kind in kinds if kind in huge):
                try:
                    dataclasses.replace(settings, **{name: value})
                except InputError:
                    continue
                passed.add(name)
    assert passed <= CHECKED_LATER, passed - CHECKED_LATER
    assert {"width", "epochs", "image_size", "seed"}.isdisjoint(passed)


def test_every_number_of_every_setting_is_checked():
    cases = list(wrong_values())
    assert len({(type(settings), name) for settings, name, _ in cases}) > 50
    passed = []
    for settings, name, value in cases:
        try:
            dataclasses.replace(settings, **{name: value})
        except InputError as error:
            assert "\n" not in str(error)
        else:
            passed.append((type(settings).__name__, name, value))
    assert not passed


def test_help_shows_the_common_options_and_help_all_every_one(capsys):
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            parse(["train", "digits/both", word])
        assert not stop.value.code
        shown[word] = capsys.readouterr().out
    for option in ("--data ", "--out ", "--epochs ", "--noise-std "):
        assert option in shown["--help"] and option in shown["--help-all"]
    for option in ("--optimizer.momentum ", "--crop-padding ", "--num-processes "):
        assert option not in shown["--help"] and option in shown["--help-all"]
    assert "--help-all" in shown["--help"] and len(shown["--help"].splitlines()) < 60
