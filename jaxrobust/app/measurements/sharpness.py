"""Sharpness: the curvature of a loss's terms in the parameters, and the largest stable rate.

All other curvatures here are in the image. The curvature in the parameters bounds the learning
rate: gradient descent leaves a quadratic valley that curves more than its rate allows.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxrobust import _validate, data, training
from jaxrobust.app import run_folder
from jaxrobust.app.config import InputError, training_perturbation
from jaxrobust.app.measurements.runner import Measured, Measurement, Work
from jaxrobust.app.program import class_weights_of, initial_state, method_of, start_from
from jaxrobust.app.progress import progress
from jaxrobust.app.report.frame import Number, frame, values_of
from jaxrobust.app.report.page import Section, Table, listed, over_runs, significant, text_row
from jaxrobust.app.study.read import Run, Study
from jaxrobust.app.trainer import TrainedRun, check_weights, load_run, make_splits
from jaxrobust.parallel import make_layout
from jaxrobust.statistics import largest_eigenvalue, largest_stable_rate

SEED = 0
"""Seeds the noise of the noisy views, and Lanczos' first vector."""

STATES = {"initial": "before training", "best": "trained"}
"""The states measured, by the names in the report."""


@dataclasses.dataclass(frozen=True)
class SharpnessSettings:
    """What the command ``sharpness`` measures."""

    num_images: int | None = None
    """Number of training images, taken from the first on, as one batch; the run's batch size by
    default."""

    def __post_init__(self):
        if self.num_images is not None:
            _validate.in_range("num_images", self.num_images, 1)


def _asked(run: TrainedRun, settings: SharpnessSettings, folder: pathlib.Path) -> dict:
    if run.config.optimizer.name != "sgd":
        raise InputError(f"Expected optimizer.name=sgd of {folder}, whose limit of the rate is "
                         f"known, got {run.config.optimizer.name}.")
    return {"num_images": settings.num_images or run.config.batch_size,
            "finished": run_folder.is_done(folder)}


def _measure(run: TrainedRun, settings: SharpnessSettings, work: Work) -> Measured:
    """Measures the largest Hessian eigenvalue in the parameters, by state and term of the loss.

    States are ``initial`` and ``best``; the term ``loss`` is the whole.

    Each term of the run's method is taken at weight 1, and the whole loss with the run's weights,
    at a batch of training images without augmentation, with batch norm in training mode; before
    training and, if the run is finished, in its best epoch. Exact products with the Hessian
    (``jax.jvp`` of ``jax.grad``).

    Raises:
      InputError: (a ValueError) if the run is not trained by SGD, of which alone the limit of the
        rate is, or the file of weights that it starts from cannot be read.
    """
    config, dataset, count = run.config, run.dataset, work.asked["num_images"]
    train = make_splits(dataset, config).train
    _validate.in_range("num_images", count, 2, len(train.labels), open_high=False)
    batch = jax.jit(functools.partial(
        data.make_batch, augment=lambda key, image: image, perturb=training_perturbation(config)))(
        jax.random.key(SEED), jnp.asarray(train.images[:count]), jnp.asarray(train.labels[:count]))
    layout = make_layout("jit")
    states = {"initial": initial_state(config, dataset, layout)}
    if config.init_from is not None:
        check_weights(config, work.folder)
        states["initial"], _ = start_from(
            config.init_from, states["initial"], config, dataset, layout)
    if work.asked["finished"]:
        states["best"] = load_run(work.folder, config, dataset).state
    model = run.model
    weights = class_weights_of(config, dataset)
    terms = _terms(model, config, weights, states["initial"], batch)
    eigenvalues: dict[str, dict[str, float]] = {}
    with progress(f"{work.label}, sharpness", len(states) * len(terms)) as shown:
        for name, state in states.items():
            start = np.random.default_rng(SEED).normal(size=ravel_pytree(state.params)[0].size)
            for term in terms:
                # As an argument, so that one compiled program serves all terms.
                chosen = {other: float(other == term) for other in terms}

                def product(vector, state=state, chosen=chosen):
                    return np.asarray(_product(
                        model, config, weights, chosen, state, batch,
                        jnp.asarray(vector.ravel(), jnp.float32)), np.float64)

                value = largest_eigenvalue(product, start)
                eigenvalues.setdefault(name, {})[term] = value
                shown.advance(**{term: value})
    return Measured({
        "eigenvalues": eigenvalues, "learning_rate": config.optimizer.learning_rate,
        "momentum": config.optimizer.momentum})


def _values(model, config, class_weights, params, state, batch) -> dict[str, jax.Array]:
    """Returns the terms of the loss, each at weight 1, and the whole."""
    loss, evaluated = training.make_objective(model, method_of(config, class_weights))(
        params, state, batch)
    return {**{name: value for name, value in evaluated.metrics.items()
               if not name.startswith("accuracy") and name not in training.NOT_FINITE},
            "loss": loss}


def _terms(model, config, class_weights, state, batch) -> list[str]:
    return list(jax.eval_shape(
        functools.partial(_values, model, config, class_weights), state.params, state, batch))


@functools.partial(jax.jit, static_argnames=("model", "config", "class_weights"))
def _product(
    model, config, class_weights, weights: dict[str, jax.Array], state, batch, vector: jax.Array
) -> jax.Array:
    """Multiplies the Hessian of the terms' weighted sum, in the parameters, by a vector [P]."""
    flat, unravel = ravel_pytree(state.params)

    def value(flat):
        values = _values(model, config, class_weights, unravel(flat), state, batch)
        return sum(weights[name] * values[name] for name in weights)

    return jax.jvp(jax.grad(value), (flat,), (vector,))[1]


LIMIT, RATE = "largest stable learning rate", "learning rate"


def numbers(run: Run) -> Iterator[Number]:
    """Yields the eigenvalues by state and term, and the learning rate beside its limit."""
    result = run.facts("sharpness") or {"eigenvalues": {}}
    for state, values in result["eigenvalues"].items():
        for term, value in values.items():
            yield Number(f"largest eigenvalue, {term}", STATES[state], value, "")
        limit = largest_stable_rate(values["loss"], result["momentum"])
        yield Number(LIMIT, STATES[state], limit, "")
        yield Number(RATE, STATES[state], result["learning_rate"], "")


def _section(study: Study) -> Section | None:
    found = values_of(frame(study, numbers))
    if not found:
        return None
    terms = list(dict.fromkeys(what for _, what, _ in found if what not in (LIMIT, RATE)))
    rows = [text_row(f"{study.labels[row]}, {state}", (
        *(over_runs(found.get((row, what, state), ())) for what in (*terms, LIMIT)),
        listed(f"{rate:g}" for rate in found[row, RATE, state])))
        for row, state in dict.fromkeys((row, state) for row, _, state in found)]
    images = listed(facts["settings"]["num_images"] for runs in study.runs.values() for run in runs
                    if (facts := run.facts("sharpness")))
    return Section(
        "sharpness", "Sharpness of the loss in the parameters",
        "At a learning rate above the limit, gradient descent leaves the valley that it is in.",
        (Table("Largest eigenvalue of the Hessian in the parameters.",
               ("Method", *(what.partition(", ")[2] for what in terms), "Limit of the rate",
                "Rate"), tuple(rows),
               f"At {images} training images; terms at weight 1, the whole loss with the run's "
               "weights. Mean over the seeds [lowest–highest].",
               "How to read: the limit is 2 (1 + m) / ((1 + 2 m) λ) for the whole loss and "
               "momentum m, that of a quadratic; training may tolerate more for some steps, since "
               "it moves to flatter regions."),))


def table_text(facts: dict) -> str:
    """Formats the result as plain text, a line for each state and term."""
    return "\n".join(
        f"{STATES[state]}: {term}: {significant(value)}; stable below a rate of "
        f"{significant(largest_stable_rate(value, facts['momentum']))}"
        for state, values in facts["eigenvalues"].items() for term, value in values.items())


SHARPNESS = Measurement(
    "sharpness", SharpnessSettings(), _measure, _asked, section=_section, numbers=(numbers,),
    text=table_text, trained=False,
    about="""Measure the sharpness of the loss and its terms, and the largest stable learning rate.

    Sharpness is the largest Hessian eigenvalue in the parameters, before training and, for finished
    runs, in the best epoch. Accepts runs that diverged.""")
