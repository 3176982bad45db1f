"""Calls of the library's public functions with one argument spoilt, for fuzzing.

What may become of such a call: an InputError of one line, or a result. What no function can use,
such as a text for an array, has to be refused; so has NaN as a setting, and an array of another
rank or length than the others.
"""

import enum
import inspect
import itertools
import pathlib
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import sklearn

import jaxrobust
from jaxrobust import (
    InputError,
    attacks,
    centroids,
    certification,
    corruptions,
    curvature,
    data,
    geometry,
    losses,
    methods,
    metrics,
    models,
    noise_level,
    perturbations,
    statistics,
    theory,
    training,
)

RANDOM = np.random.default_rng(0)
B, D, C = 6, 5, 3
FEATURES = RANDOM.normal(size=(B, D)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)
LOGITS = RANDOM.normal(size=(B, 4)).astype(np.float32)
KERNEL = RANDOM.normal(size=(D, C)).astype(np.float32)
BIAS = np.zeros(C, np.float32)
CENTROIDS = RANDOM.normal(size=(C, D)).astype(np.float32)
PRESENT = np.ones(C, bool)
STATE = centroids.CentroidState(CENTROIDS, PRESENT)
IMAGES = RANDOM.uniform(size=(B, 4, 4, 3)).astype(np.float32)
PIXELS = RANDOM.integers(0, 256, (B, 4, 4, 3), np.uint8)
WEIGHTS = RANDOM.normal(size=(1, 4)).astype(np.float32)
CORRECT = np.array([True, False, True, True, False, True])
SCORES = RANDOM.uniform(size=B)
POSITIVE = RANDOM.uniform(0.1, 1, size=B).astype(np.float32)
KEY = jax.random.key(0)


def logits_fn(images):
    """Logits [B, 4]."""
    means = images.reshape(len(images), -1).mean(axis=1, keepdims=True)
    return jnp.tanh(means) * jnp.asarray(WEIGHTS)


def loss(images):
    """A loss [B], each of its own image."""
    return jnp.sum(jnp.tanh(images) ** 2, axis=tuple(range(1, images.ndim)))


def classify(images):
    return logits_fn(images).argmax(axis=1)


class Case(NamedTuple):
    """A public function with arguments that it takes."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    free: frozenset[str] = frozenset()  # arguments with which arrays of any length go


def case(function, /, *free, **arguments):
    """A case; ``free`` are arrays with a length of their own, as images of curvature are."""
    return Case(function, arguments, frozenset({*free, "x"}))


_ERRORS = {name: 0.3 for name in corruptions.BENCHMARK}
_OF_LOSS = {"loss": loss, "x": IMAGES, "key": KEY}
_ATTACK = {"logits_fn": logits_fn, "images": IMAGES, "labels": LABELS}
_BOUND = {"empirical_error": np.full(2, 0.1, np.float32), "rho": 0.5, "feature_bound": 1.0,
          "centre_bound": 1.0, "num_samples": 10, "failure_probability": 0.05}
_STATISTICS = metrics.class_statistics(
    np.repeat(FEATURES, 4, axis=0) + RANDOM.normal(size=(24, D)).astype(np.float32),
    np.repeat(LABELS, 4), C)
_LOGITS = {"logits": LOGITS, "labels": LABELS}

CASES: dict[str, Case] = {
    # attacks
    "apgd": case(attacks.apgd, **_ATTACK, key=KEY, norm="linf", epsilon=0.1, num_steps=1),
    "fab": case(attacks.fab, **_ATTACK, norm="l2", num_steps=1, num_targets=1),
    "fgsm": case(attacks.fgsm, **_ATTACK, norm="linf", epsilon=0.1),
    "pgd": case(attacks.pgd, **_ATTACK, key=KEY, norm="linf", epsilon=0.1, num_steps=1),
    "square_attack": case(attacks.square_attack, **_ATTACK, key=KEY, norm="linf", epsilon=0.1,
                          num_queries=1),
    "dlr_loss": case(attacks.dlr_loss, **_LOGITS),
    "targeted_dlr_loss": case(attacks.targeted_dlr_loss, **_LOGITS, targets=(LABELS + 1) % 4),
    # centroids, geometry, losses
    "init_centroids": case(centroids.init_centroids, num_classes=3, dim=2),
    "update_centroids": case(centroids.update_centroids, state=STATE, features=FEATURES,
                             labels=LABELS, momentum=0.5),
    "class_dispersion": case(geometry.class_dispersion, features=FEATURES, labels=LABELS,
                             num_classes=C),
    "class_margin": case(geometry.class_margin, features=FEATURES, labels=LABELS, kernel=KERNEL,
                         bias=BIAS),
    "signed_boundary_distance": case(geometry.signed_boundary_distance, points=FEATURES,
                                     labels=LABELS, kernel=KERNEL, bias=BIAS),
    "rescale_head": case(geometry.rescale_head, params={
        "features": {"kernel": KERNEL, "bias": BIAS}, "head": {"kernel": KERNEL, "bias": BIAS}},
        nu=2.0, feature_layer="features", head="head"),
    "RobustLossConfig": case(losses.RobustLossConfig, alpha=1.0, beta=1.0, gamma_reg=0.1, lam=1.0,
                             delta_v=0.5, delta_d=5.0, momentum=0.9, boundaries="max",
                             compact_centroids="momentum", align_to="other"),
    "centroid_norm_loss": case(losses.centroid_norm_loss, centroids=CENTROIDS, present=PRESENT),
    "compactness_loss": case(losses.compactness_loss, "centroids", features=FEATURES, labels=LABELS,
                             centroids=CENTROIDS, delta_v=0.5, linear_beyond=2.0),
    "margin_loss": case(losses.margin_loss, centroids=CENTROIDS, present=PRESENT, kernel=KERNEL,
                        bias=BIAS, delta_d=1.0, boundaries="max"),
    "robust_loss": case(losses.robust_loss, features=FEATURES, noisy_features=FEATURES,
                        labels=LABELS, kernel=KERNEL, bias=BIAS, state=STATE,
                        config=losses.RobustLossConfig()),
    "softmax_cross_entropy": case(losses.softmax_cross_entropy, **_LOGITS),
    "softmax_loss": case(losses.softmax_loss, **_LOGITS, class_weights=np.ones(4, np.float32),
                         label_smoothing=0.1),
    "stability_loss": case(losses.stability_loss, features=FEATURES, noisy_features=FEATURES),
    # certification
    "certify": case(certification.certify, classify=classify, image_batch=IMAGES[:1], key=KEY,
                    sigma=0.1, n0=2, n=4, alpha=0.1, batch_size=2),
    "count_labels": case(certification.count_labels, "image", classify=classify, image=IMAGES[0],
                         key=KEY, start=0, num=2, batch_size=2, sigma=0.1),
    "certified_radius": case(certification.certified_radius, hits=9, n=10, sigma=0.1, alpha=0.1),
    "certified_accuracy": case(
        certification.certified_accuracy, "radii", certificate=certification.Certificate(
            LABELS, np.full(B, 0.5), np.full(B, 10)), labels=LABELS, radii=np.array([0.0, 0.3])),
    # curvature
    "hvp": case(curvature.hvp, loss=loss, x=IMAGES, v=IMAGES),
    "squared_frobenius": case(curvature.squared_frobenius, **_OF_LOSS, num_probes=2,
                              distribution="normal", chunk_size=1),
    "finite_difference_curvature": case(curvature.finite_difference_curvature, **_OF_LOSS,
                                        step=0.01, num_probes=2, chunk_size=1),
    "smoothed_curvature": case(curvature.smoothed_curvature, **_OF_LOSS, sigma=0.1, num_draws=3,
                               chunk_size=1),
    "piecewise_linear_spectrum": case(curvature.piecewise_linear_spectrum, logits_fn=logits_fn,
                                      x=IMAGES),
    "gauss_newton_gap": case(curvature.gauss_newton_gap, loss=loss, logits_fn=logits_fn, x=IMAGES,
                             key=KEY),
    "ritz_values": case(curvature.ritz_values, **_OF_LOSS, num_products=2),
    "top_eigenvalues": case(curvature.top_eigenvalues, **_OF_LOSS, k=1, num_products=2),
    "spectral_density": case(curvature.spectral_density, **_OF_LOSS, num_products=2, num_probes=2,
                             relative_width=0.02, num_points=5),
    "hessian_trace": case(curvature.hessian_trace, **_OF_LOSS, num_probes=4),
    "leave_one_out_squared_frobenius": case(curvature.leave_one_out_squared_frobenius, **_OF_LOSS,
                                            num_probes=4),
    "loss_surface": case(curvature.loss_surface, **_OF_LOSS, extent=0.1, resolution=3),
    "normalised_inputs": case(curvature.normalised_inputs, "mean", "std", function=loss,
                              mean=(0.5,) * 3, std=(0.5,) * 3),
    # metrics
    "auroc": case(metrics.auroc, doubt=SCORES, correct=CORRECT),
    "brier_score": case(metrics.brier_score, **_LOGITS),
    "class_statistics": case(metrics.class_statistics, features=FEATURES, labels=LABELS,
                             num_classes=C),
    "classwise_calibration_error": case(metrics.classwise_calibration_error, **_LOGITS, num_bins=5,
                                        bins="equal width"),
    "coverage_curve": case(metrics.coverage_curve, doubt=SCORES, correct=CORRECT),
    "detection_quality": case(metrics.detection_quality, "familiar", "strange", familiar=SCORES,
                              strange=SCORES + 0.5, true_positive_rate=0.9),
    "doubt_threshold": case(metrics.doubt_threshold, "doubt", doubt=SCORES, coverage=0.9),
    "energy": case(metrics.energy, "logits", logits=LOGITS, temperature=1.0),
    "expected_calibration_error": case(metrics.expected_calibration_error, **_LOGITS, num_bins=5,
                                       bins="equal width"),
    "fit_temperature": case(metrics.fit_temperature, logits=4 * np.eye(4, dtype=np.float32)[
        [0, 1, 2, 0, 1, 1]], labels=LABELS),
    "improbability": case(metrics.improbability, "logits", logits=LOGITS),
    "knn_distance": case(metrics.knn_distance, "features", "training_features", features=FEATURES,
                         training_features=FEATURES, num_neighbours=2),
    "mahalanobis_distance": case(metrics.mahalanobis_distance, features=FEATURES, classes=LABELS,
                                 statistics=_STATISTICS),
    "nearest_distance": case(metrics.nearest_distance, "features",
                             distance=metrics.scaled_distance, features=FEATURES,
                             statistics=_STATISTICS),
    "negative_log_likelihood": case(metrics.negative_log_likelihood, **_LOGITS),
    "reliability_diagram": case(metrics.reliability_diagram, **_LOGITS, num_bins=5,
                                bins="equal width"),
    "scaled_distance": case(metrics.scaled_distance, features=FEATURES, classes=LABELS,
                            statistics=_STATISTICS),
    # perturbations, corruptions
    "gaussian": case(perturbations.gaussian, std=0.1),
    "sometimes_gaussian": case(perturbations.sometimes_gaussian, std=0.1, probability=0.5),
    "random_gaussian": case(perturbations.random_gaussian, std=0.1),
    "uniform": case(perturbations.uniform, amplitude=0.1),
    "laplace": case(perturbations.laplace, std=0.1),
    "speckle": case(perturbations.speckle, std=0.1),
    "salt_and_pepper": case(perturbations.salt_and_pepper, amount=0.1),
    "occlusion": case(perturbations.occlusion, patches=2, size=2),
    "stripes": case(perturbations.stripes, number=2, thickness=2),
    "down_up": case(perturbations.down_up, factor=2),
    "parse_perturbation": case(perturbations.parse_perturbation, text="gaussian(0.1)"),
    "per_example": case(perturbations.per_example, "images", perturb=perturbations.identity(),
                        key=KEY, images=IMAGES, indices=np.arange(B)),
    "corruption": case(corruptions.corruption, name="fog", severity=3),
    "parameters_for": case(corruptions.parameters_for, name="fog", severity=3, height=8, width=8),
    "flip_rate": case(corruptions.flip_rate, "predictions", predictions=LABELS.reshape(2, 3),
                      noise=False),
    "flips": case(corruptions.flips, "predictions", predictions=LABELS.reshape(2, 3), noise=True),
    "corruption_errors": case(corruptions.corruption_errors, errors=_ERRORS, baseline=_ERRORS),
    "mean_corruption_error": case(corruptions.mean_corruption_error, errors=_ERRORS,
                                  baseline=_ERRORS),
    "mean_corruption_accuracy": case(corruptions.mean_corruption_accuracy, errors=_ERRORS),
    # theory
    "curvature_lower_bound": case(
        theory.curvature_lower_bound, eta=POSITIVE, loss_outside=POSITIVE, loss=POSITIVE,
        gradient_norm_squared=POSITIVE, sigma=0.1),
    "curvature_upper_bound": case(theory.curvature_upper_bound, "eta", "kernel", eta=POSITIVE,
                                  delta=0.1, sigma=0.1, kernel=KERNEL, k_max=1.0),
    "feature_stability": case(theory.feature_stability, features_fn=logits_fn, **_OF_LOSS,
                              sigma=0.1, delta=0.1, num_draws=2),
    "generalization_bound": case(theory.generalization_bound, "empirical_error", **_BOUND),
    "held_out_bound": case(theory.held_out_bound, "empirical_error", **_BOUND),
    "jensen_shannon_bound": case(theory.jensen_shannon_bound, "tau", tau=POSITIVE),
    "ramp_loss": case(theory.ramp_loss, "margin", margin=POSITIVE, rho=0.5),
    "smoothed_curvature_bound": case(theory.smoothed_curvature_bound, "variance",
                                     variance=POSITIVE, sigma=0.1),
    # statistics
    "share_error": case(statistics.share_error, share=0.5, number=10),
    "share_interval": case(statistics.share_interval, successes=3, number=10, confidence=0.9),
    "share_upper_bound": case(statistics.share_upper_bound, successes=3, number=10,
                              failure_probability=0.1),
    "sign_test": case(statistics.sign_test, first=3, second=4),
    "pearson": case(statistics.pearson, x=SCORES, y=POSITIVE),
    "spearman": case(statistics.spearman, x=SCORES, y=POSITIVE),
    "largest_stable_rate": case(statistics.largest_stable_rate, curvature=2.0, momentum=0.9),
    # training, methods, models
    "sgd": case(training.sgd, learning_rate=0.1, momentum=0.9, weight_decay=0.0, clip_norm=1.0),
    "adam": case(training.adam, learning_rate=0.1, weight_decay=0.0),
    "piecewise_schedule": case(training.piecewise_schedule, "decay_steps", learning_rate=0.1,
                               decay_steps=(2, 4), decay_factor=0.5),
    "make_method": case(methods.make_method, name="robust", robust=losses.RobustLossConfig(),
                        stability_weight=1.0),
    "create_model": case(models.create_model, "mean", "std", name="small_cnn", num_classes=3,
                         num_features=2, width=2, mean=(0.5,), std=(0.5,), feature_layer="dense"),
    # data
    "batch_sizes": case(data.batch_sizes, size=10, batch_size=4),
    "split_rows": case(data.split_rows, "labels", labels=np.repeat(LABELS, 3), size=6, seed=0),
    "make_batch": case(data.make_batch, key=KEY, images=PIXELS, labels=LABELS,
                       augment=data.standard_augmentation(padding=1),
                       perturb=perturbations.identity()),
    "standard_augmentation": case(data.standard_augmentation, padding=2),
    "photo_augmentation": case(data.photo_augmentation, brightness=0.3, contrast=0.3,
                               saturation=0.3, degrees=10.0, distortion=0.5,
                               perspective_probability=0.5),
    "noise_std": case(noise_level.noise_std, "images", images=RANDOM.integers(
        0, 256, (2, 16, 16, 3), np.uint8)),
    "load_dataset": case(data.load_dataset, name="digits"),
    "read_image": case(data.read_image, image_size=(4, 4), channels=3, path=str(
        pathlib.Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg")),
    "files_from_csv": case(data.files_from_csv, text="path,label,split\na,b,train\n"),
}

UNTESTED = {
    "masking_checks": "made of pgd and square_attack",
    "auto_attack": "made of apgd, fab and square_attack",
    "identity": "takes nothing",
}
"""Public functions that are not in CASES, with the reason."""


def public_functions() -> set[str]:
    """The names of the functions of ``jaxrobust`` itself."""
    return {name for name in jaxrobust.__all__
            if inspect.isroutine(getattr(jaxrobust, name))}


class Must(enum.Enum):
    """What has to become of a spoilt call."""

    BE_REFUSED = 1
    NOT_CRASH = 2


class Spoilt(NamedTuple):
    """A value in the place of a good one."""

    what: str
    value: Any
    must: Must


_NO_VALUE = ("text", {}, object())


def spoilt_values(one: Case, name: str) -> list[Spoilt]:
    """What can be wrong with an argument."""
    value = one.arguments[name]
    found = [Spoilt(f"a {type(wrong).__name__}", wrong, Must.BE_REFUSED) for wrong in _NO_VALUE
             if not (isinstance(value, str) and isinstance(wrong, str))]
    if not _takes_none(one.function, name):
        found.append(Spoilt("None", None, Must.BE_REFUSED))
    if isinstance(value, str):
        found += [Spoilt("misspelt", value + "x", Must.BE_REFUSED),
                  Spoilt("empty", "", Must.BE_REFUSED), Spoilt("a number", 3, Must.BE_REFUSED)]
        if name in ("text", "path"):
            found = [one._replace(must=Must.NOT_CRASH) if isinstance(one.value, str) else one
                     for one in found]
    elif isinstance(value, np.ndarray) and value.ndim:
        found += _spoilt_arrays(value, name in one.free)
    elif isinstance(value, bool):
        return []  # Any value is true or false.
    elif isinstance(value, int):
        found += [Spoilt(str(wrong), wrong, must) for wrong, must in (
            (np.nan, Must.BE_REFUSED), (2.5, Must.BE_REFUSED), (np.inf, Must.BE_REFUSED),
            (-1, Must.NOT_CRASH), (0, Must.NOT_CRASH), (-2**70, Must.NOT_CRASH))]
        found.append(Spoilt("an array", np.arange(3), Must.BE_REFUSED))
    elif isinstance(value, float | np.floating):
        found += [Spoilt(str(wrong), wrong, must) for wrong, must in (
            (np.nan, Must.BE_REFUSED), (np.inf, Must.NOT_CRASH), (-np.inf, Must.NOT_CRASH),
            (-1.0, Must.NOT_CRASH), (0.0, Must.NOT_CRASH), (1e300, Must.NOT_CRASH),
            (10**400, Must.NOT_CRASH))]
        found.append(Spoilt("complex", 1j, Must.BE_REFUSED))
    return found


def _spoilt_arrays(value, free):
    refuse = Must.NOT_CRASH if free else Must.BE_REFUSED
    yield Spoilt("a further axis", value[..., None], refuse)
    yield Spoilt("an axis less", value[0], refuse)
    yield Spoilt("empty", value[:0], refuse)
    yield Spoilt("another length", value[:-1], refuse)
    yield Spoilt("texts", np.full(value.shape, "a"), Must.BE_REFUSED)
    yield Spoilt("objects", np.full(value.shape, None, object), Must.BE_REFUSED)
    yield Spoilt("complex", value.astype(np.complex64), Must.BE_REFUSED)
    if np.issubdtype(value.dtype, np.floating):
        for wrong in (np.nan, np.inf, -np.inf, 1e30, -1e30):
            array = value.copy()
            array.flat[0] = wrong
            yield Spoilt(f"{wrong} in it", array, Must.NOT_CRASH)
    elif value.dtype == np.int32:
        yield Spoilt("floats", value.astype(np.float32) + 0.5, Must.BE_REFUSED)
        for wrong in (-1, 99, 2**31 - 1):
            array = value.copy()
            array.flat[0] = wrong
            yield Spoilt(f"{wrong} in it", array, Must.NOT_CRASH)


def _takes_none(function, name) -> bool:
    parameter = inspect.signature(function).parameters[name]
    return parameter.default is None or type(None) in typing.get_args(parameter.annotation)


def every_spoilt_call(name: str) -> list[tuple[str, Spoilt]]:
    """All spoilt values of all arguments of a case."""
    one = CASES[name]
    return list(itertools.chain.from_iterable(
        [(argument, spoilt) for spoilt in spoilt_values(one, argument)]
        for argument in one.arguments))


def spoilt_calls(name: str) -> st.SearchStrategy[tuple[str, Spoilt]]:
    """Draws one of :func:`every_spoilt_call`, or a number drawn for one of the numbers."""
    one = CASES[name]
    drawn = [st.sampled_from(every_spoilt_call(name))]
    for argument, value in one.arguments.items():
        if isinstance(value, bool | str) or not isinstance(value, int | float):
            continue
        numbers = st.integers(-2**70, 0) if isinstance(value, int) else st.floats()
        drawn.append(numbers.map(lambda number, argument=argument: (
            argument, Spoilt(repr(number), number, Must.NOT_CRASH))))
    return st.one_of(drawn)


def fault_of(name: str, argument: str, spoilt: Spoilt) -> str | None:
    """What is wrong with how a function takes a spoilt argument; None if nothing is."""
    one = CASES[name]
    where = f"{name}({argument}: {spoilt.what})"
    try:
        one.function(**one.arguments | {argument: spoilt.value})
    except InputError as error:
        if len(str(error).splitlines()) != 1:
            return f"{where} is refused in several lines: {error}"
        return None
    except Exception as error:  # What the fuzzing looks for.
        line = (str(error).splitlines() or [""])[0]
        return f"{where} raises {type(error).__name__}: {line[:150]}"
    return f"{where} is accepted" if spoilt.must is Must.BE_REFUSED else None
