"""Runs that weight the classes by their numbers of images."""

import dataclasses

import jax
import numpy as np
import pytest
import reference

from jaxrobust import InputError, data
from jaxrobust.app import program
from jaxrobust.app.config import RunConfig
from jaxrobust.app.trainer import variables_of
from jaxrobust.parallel import make_layout
from jaxrobust.perturbations import gaussian


def test_weights_of_an_unknown_name_are_one_line():
    with pytest.raises(InputError) as error:
        RunConfig(select="last", class_weights="balance")
    assert str(error.value) == (
        "Unknown class_weights 'balance'. Did you mean 'balanced'? "
        "Expected one of: none, balanced.")


def unequal(counts):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    rng = np.random.default_rng(0)
    split = data.Split(rng.integers(0, 256, (len(labels), 6, 6, 1), np.uint8), labels)
    names = tuple(f"class {c}" for c in range(len(counts)))
    return data.Dataset("toy", split, split, names, (0.5,), (0.25,), flip=True)


def test_balanced_weights_are_those_of_scikit_learn_over_the_images_trained_on():
    from sklearn.utils.class_weight import compute_class_weight

    dataset = unequal((40, 8, 12))
    config = RunConfig(validation_size=0.25, class_weights="balanced")
    labels = dataset.train.labels[program.rows_of(config, dataset)[0]]
    assert np.bincount(labels).tolist() == [30, 6, 9]
    # 45 / (3 * 30), 45 / (3 * 6), 45 / (3 * 9).
    np.testing.assert_allclose(program.class_weights_of(config, dataset), (0.5, 2.5, 5 / 3))
    np.testing.assert_allclose(
        program.class_weights_of(config, dataset),
        compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert program.class_weights_of(
        dataclasses.replace(config, class_weights="none"), dataset) is None


def test_an_update_of_a_run_has_the_loss_of_its_weights():
    dataset, layout = unequal((40, 8)), make_layout("jit")
    config = RunConfig(
        validation_size=8, model="small_cnn", width=2, num_features=3, batch_size=40, epochs=1,
        method="normal", augmentation="crop", crop_padding=0, class_weights="balanced")
    rows = program.rows_of(config, dataset)[0]
    images, labels = dataset.train.images[rows], dataset.train.labels[rows]
    for kind in ("none", "balanced"):
        run = dataclasses.replace(config, class_weights=kind)
        state = program.initial_state(run, dataset, layout)
        batch = data.make_batch(
            jax.random.fold_in(state.key, state.step), images, labels,
            augment=data.standard_augmentation(padding=0), perturb=gaussian(run.noise_std))
        outputs, _ = program.model_of(run, dataset).apply(
            variables_of(state), batch.clean, train=True, mutable=["batch_stats"])
        logits = np.asarray(outputs.logits, np.float64)
        expected = reference.softmax_loss(logits, labels) if kind == "none" else \
            reference.weighted_softmax_loss(logits, labels, (40 / (2 * 33), 40 / (2 * 7)))
        step = program.program_of([run], dataset, layout).streamed
        _, metrics = step(state, program.stack_configs([run]), (
            images, labels, np.arange(40, dtype=np.int32)))
        np.testing.assert_allclose(metrics["softmax"], [expected], rtol=1e-4)
