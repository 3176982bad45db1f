"""Bad input fails at the door: one line with the argument, its value and what is expected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust import (
    _validate,
    evaluation,
    geometry,
    losses,
    methods,
    models,
    perturbations,
    training,
)
from jaxrobust._validate import InputError
from jaxrobust.centroids import CentroidState, init_centroids, update_centroids
from jaxrobust.data import augment, batching
from jaxrobust.losses import RobustLossConfig

FEATURES, LABELS = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
CENTROIDS, PRESENT = np.zeros((2, 3), np.float32), np.ones(2, bool)
KERNEL, BIAS = np.zeros((3, 2), np.float32), np.zeros(2, np.float32)
STATE = CentroidState(CENTROIDS, PRESENT)
PARAMS = {"features": {"kernel": KERNEL}, "head": {"bias": BIAS}}
PIXELS = np.zeros((4, 6, 6, 1), np.uint8)


def compactness(features=FEATURES, labels=LABELS, centroids=CENTROIDS, delta_v=0.5):
    return losses.compactness_loss(features, labels, centroids, delta_v=delta_v)


def margin(centroids=CENTROIDS, present=PRESENT, kernel=KERNEL, bias=BIAS, delta_d=1.0, **options):
    return losses.margin_loss(centroids, present, kernel, bias, delta_d=delta_d, **options)


def robust(features=FEATURES, noisy=FEATURES, labels=LABELS, kernel=KERNEL, bias=BIAS):
    return losses.robust_loss(features, noisy, labels, kernel, bias, STATE, RobustLossConfig())


def make_batch(pixels=PIXELS, labels=LABELS):
    return augment.make_batch(
        jax.random.key(0), pixels, labels, augment=augment.standard_augmentation(),
        perturb=perturbations.identity())


def create(**options):
    sizes = {"num_classes": 2, "num_features": 2, "width": 1, "mean": (0.5,), "std": (0.5,)}
    return models.create_model(**{"name": "small_cnn", **sizes, **options})


WRONG_NUMBERS = {
    "delta_v": (lambda: compactness(delta_v=-1), "delta_v=-1", "[0, inf)"),
    "delta_v_nan": (lambda: compactness(delta_v=np.nan), "delta_v=nan", "[0, inf)"),
    "delta_d": (lambda: margin(delta_d=-0.5), "delta_d=-0.5", "[0, inf)"),
    "one_class": (lambda: margin(CENTROIDS[:1], PRESENT[:1], KERNEL[:, :1], BIAS[:1]),
                  "number of classes=1", "[2, inf)"),
    **{f"one_class_{name}": (call, "number of classes=1", "[2, inf)") for name, call in (
        ("softmax", lambda: losses.softmax_loss(FEATURES[:, :1], LABELS)),
        ("distance", lambda: geometry.signed_boundary_distance(
            FEATURES, LABELS, KERNEL[:, :1], BIAS[:1])),
        ("class_margin", lambda: geometry.class_margin(FEATURES, LABELS, KERNEL[:, :1], BIAS[:1])),
        ("robust", lambda: losses.robust_loss(
            FEATURES, FEATURES, LABELS, KERNEL[:, :1], BIAS[:1], init_centroids(1, 3),
            RobustLossConfig())),
        ("predictions", lambda: list(evaluation.evaluate(
            lambda images: images[:, 0, 0], PIXELS, LABELS, key=jax.random.key(0)))))},
    "momentum_1": (lambda: update_centroids(STATE, FEATURES, LABELS, momentum=1.0),
                   "momentum=1.0", "[0, 1)"),
    "momentum_negative": (lambda: update_centroids(STATE, FEATURES, LABELS, momentum=-0.1),
                          "momentum=-0.1", "[0, 1)"),
    **{f"direction_{name}": (
        lambda name=name, value=value: RobustLossConfig(
            **{"direction": True, "delta_v": 0.0, "delta_d": 1.0, name: value}),
        f"direction=True and {name}={value}", f"[0, {most}]")
       for name, value, most in (("delta_v", 2.5, 2), ("delta_d", 5.0, 1))},
    "nu": (lambda: geometry.rescale_head(PARAMS, 0.0), "nu=0.0", "(0, inf)"),
    "std": (lambda: perturbations.gaussian(-0.1), "std=-0.1", "[0, inf)"),
    "amplitude": (lambda: perturbations.uniform(-0.1), "amplitude=-0.1", "[0, inf)"),
    "padding": (lambda: augment.standard_augmentation(padding=-1), "padding=-1", "[0, inf)"),
    "batch_size_0": (lambda: batching.batch_sizes(4, 0),
                     "batch_size=0", "[1, 4]"),
    "batch_size_5": (lambda: batching.batch_sizes(4, 5),
                     "batch_size=5", "[1, 4]"),
    "stability_weight": (lambda: methods.make_method("stability", stability_weight=-1),
                         "stability_weight=-1", "[0, inf)"),
    "sgd_momentum": (lambda: training.sgd(0.1, momentum=1.0), "momentum=1.0", "[0, 1)"),
    "sgd_weight_decay": (lambda: training.sgd(0.1, weight_decay=-1), "weight_decay=-1", "[0, inf)"),
    "sgd_learning_rate": (lambda: training.sgd(0.0), "learning_rate=0.0", "(0, inf)"),
    "sgd_clip_norm": (lambda: training.sgd(0.1, clip_norm=0.0), "clip_norm=0.0", "(0, inf)"),
    **{f"config_{name}": (lambda name=name: RobustLossConfig(**{name: -1.0}), f"{name}=-1.0", "[0,")
       for name in ("alpha", "beta", "gamma_reg", "lam", "delta_v", "delta_d", "momentum")},
    "config_momentum_1": (lambda: RobustLossConfig(momentum=1.0), "momentum=1.0", "[0, 1)"),
}

WRONG_INTEGERS = {
    "num_classes": (lambda: init_centroids(0, 3), "num_classes=0", 1),
    "num_classes_float": (lambda: init_centroids(2.0, 3), "num_classes=2.0", 1),
    "dim": (lambda: init_centroids(3, 0), "dim=0", 1),
    "dim_bool": (lambda: init_centroids(3, True), "dim=True", 1),
    "dispersion": (lambda: geometry.class_dispersion(FEATURES, LABELS, 2.5), "num_classes=2.5", 1),
    "model_num_classes": (lambda: create(num_classes=1), "num_classes=1", 2),
    "model_num_features": (lambda: create(num_features=0), "num_features=0", 1),
    "model_width": (lambda: create(width=0), "width=0", 1),
}

WRONG_DTYPES = {
    "bool_labels": (lambda: compactness(labels=LABELS == 0), "labels of an integer dtype", "bool"),
    "float_labels": (lambda: update_centroids(STATE, FEATURES, FEATURES[:, 0]),
                     "labels of an integer dtype", "float32"),
    "robust_labels": (lambda: robust(labels=LABELS == 0), "labels of an integer dtype", "bool"),
    "dispersion_labels": (lambda: geometry.class_dispersion(FEATURES, LABELS == 0, 2),
                          "labels of an integer dtype", "bool"),
    "margin_labels": (lambda: geometry.class_margin(FEATURES, LABELS == 0, KERNEL, BIAS),
                      "labels of an integer dtype", "bool"),
    "softmax_labels": (lambda: losses.softmax_loss(FEATURES, LABELS == 0),
                       "labels of an integer dtype", "bool"),
    "features": (lambda: compactness(features=FEATURES.astype(np.int32)),
                 "features of a floating dtype", "int32"),
    "robust_noisy": (lambda: robust(noisy=FEATURES.astype(np.uint8)),
                     "noisy_features of a floating dtype", "uint8"),
    "logits": (lambda: losses.softmax_loss(FEATURES.astype(np.int32), LABELS),
               "logits of a floating dtype", "int32"),
}

WRONG_SHAPES = {
    **{f"{name}_of_no_example": (call, expected, "(0, 3)") for name, call, expected in (
        ("update", lambda: update_centroids(STATE, FEATURES[:0], LABELS[:0]), "features of shape"),
        ("compactness", lambda: compactness(FEATURES[:0], LABELS[:0]), "features of shape"),
        ("robust", lambda: robust(FEATURES[:0], FEATURES[:0], LABELS[:0]), "features of shape"),
        ("stability", lambda: losses.stability_loss(FEATURES[:0], FEATURES[:0]),
         "features of shape"),
        ("softmax", lambda: losses.softmax_loss(FEATURES[:0], LABELS[:0]), "logits of shape"),
        ("distance", lambda: geometry.signed_boundary_distance(
            FEATURES[:0], LABELS[:0], KERNEL, BIAS), "points of shape"),
        ("dispersion", lambda: geometry.class_dispersion(FEATURES[:0], LABELS[:0], 2),
         "features of shape"),
        ("class_margin", lambda: geometry.class_margin(FEATURES[:0], LABELS[:0], KERNEL, BIAS),
         "features of shape"))},
    "update_labels": (lambda: update_centroids(STATE, FEATURES, LABELS[:3]),
                      "labels of shape [B] with B=4", "(3,)"),
    "update_features": (lambda: update_centroids(STATE, FEATURES[0], LABELS),
                        "features of shape [B, d]", "(3,)"),
    "update_mean": (lambda: update_centroids(
        CentroidState(CENTROIDS[:, :2], PRESENT), FEATURES, LABELS),
        "state.mean of shape", "(2, 2)"),
    "update_seen": (lambda: update_centroids(
        CentroidState(CENTROIDS, PRESENT[:1]), FEATURES, LABELS),
        "state.seen of shape [C]", "(1,)"),
    "compactness_centroids": (lambda: compactness(centroids=CENTROIDS[:, :2]),
                              "centroids of shape [C, d]", "(2, 2)"),
    "compactness_labels": (lambda: compactness(labels=LABELS[:, None]),
                           "labels of shape [B]", "(4, 1)"),
    # A kernel in PyTorch's layout.
    "margin_kernel": (lambda: margin(kernel=KERNEL.T), "kernel of shape [d, C]", "(2, 3)"),
    "margin_bias": (lambda: margin(bias=BIAS[:1]), "bias of shape [C] with C=2", "(1,)"),
    "margin_present": (lambda: margin(present=PRESENT[:1]), "present of shape [C]", "(1,)"),
    "norm_present": (lambda: losses.centroid_norm_loss(CENTROIDS, PRESENT[:1]),
                     "present of shape [C]", "(1,)"),
    "stability_noisy": (lambda: losses.stability_loss(FEATURES, FEATURES[:2]),
                        "noisy_features of shape [B, d] with B=4", "(2, 3)"),
    "robust_features": (lambda: robust(features=FEATURES[:, :2], noisy=FEATURES[:, :2]),
                        "state.mean of shape [C, d]", "(2, 3)"),
    "robust_noisy_batch": (lambda: robust(noisy=FEATURES[:2]), "noisy_features of shape",
                           "(2, 3)"),
    "robust_noisy_dim": (lambda: robust(noisy=FEATURES[:, :2]), "noisy_features of shape",
                         "(4, 2)"),
    "robust_kernel": (lambda: robust(kernel=KERNEL.T), "kernel of shape [d, C]", "(2, 3)"),
    "distance_points": (lambda: geometry.signed_boundary_distance(
        FEATURES[0], LABELS, KERNEL, BIAS), "points of shape [N, d]", "(3,)"),
    "distance_kernel": (lambda: geometry.signed_boundary_distance(
        FEATURES, LABELS, KERNEL.T, BIAS), "kernel of shape [d, C]", "(2, 3)"),
    "dispersion_labels": (lambda: geometry.class_dispersion(FEATURES, LABELS[:3], 2),
                          "labels of shape [N] with N=4", "(3,)"),
    "class_margin_features": (lambda: geometry.class_margin(FEATURES[0], LABELS, KERNEL, BIAS),
                              "features of shape [N, d]", "(3,)"),
    "class_margin_kernel": (lambda: geometry.class_margin(FEATURES, LABELS, KERNEL.T, BIAS),
                            "kernel of shape [d, C]", "(2, 3)"),
    "per_example": (lambda: perturbations.per_example(
        perturbations.identity(), jax.random.key(0), PIXELS, LABELS[:3]),
        "indices of shape [B] with B=4", "(3,)"),
    "make_batch_images": (lambda: make_batch(pixels=PIXELS[..., 0]),
                          "images of shape [B, H, W, channels]", "(4, 6, 6)"),
    "make_batch_labels": (lambda: make_batch(labels=LABELS[:3]),
                          "labels of shape [B] with B=4", "(3,)"),
}

UNKNOWN_OPTIONS = {
    "boundaries": (lambda: margin(boundaries="maximum"), "boundaries", "maximum", "max"),
    "config_boundaries": (lambda: RobustLossConfig(boundaries="meen"), "boundaries", "meen",
                          "mean"),
    **{f"config_{name}": (lambda name=name: RobustLossConfig(**{name: "momentun"}), name,
                          "momentun", "momentum")
       for name in ("compact_centroids", "margin_centroids", "norm_centroids")},
    "config_align_to": (lambda: RobustLossConfig(align_to="others"), "align_to", "others",
                        "other"),
    "method": (lambda: methods.make_method("robus"), "method", "robus", "robust"),
    "model": (lambda: create(name="resnet-18"), "model", "resnet-18", "resnet18"),
    "feature_layer": (lambda: geometry.rescale_head(PARAMS, 2.0, feature_layer="feature"),
                      "feature_layer", "feature", "features"),
    "head": (lambda: geometry.rescale_head(PARAMS, 2.0, head="heads"), "head", "heads", "head"),
}


def message_of(call):
    """The message of the error, which is a ValueError of one line."""
    with pytest.raises(InputError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("case", WRONG_NUMBERS)
def test_a_number_out_of_range_is_named_with_its_range(case):
    call, named, interval = WRONG_NUMBERS[case]
    message = message_of(call)
    assert message.startswith(f"Expected {named} in {interval}")


@pytest.mark.parametrize("case", WRONG_INTEGERS)
def test_what_is_no_integer_or_too_small_is_named_with_the_least(case):
    call, named, least = WRONG_INTEGERS[case]
    assert message_of(call) == f"Expected {named} to be an integer >= {least}."


@pytest.mark.parametrize("case", WRONG_DTYPES)
def test_a_wrong_dtype_is_named_with_the_one_expected(case):
    call, expected, found = WRONG_DTYPES[case]
    assert message_of(call) == f"Expected {expected}, got {found}."


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_a_wrong_shape_is_named_with_the_one_expected(case):
    call, expected, found = WRONG_SHAPES[case]
    message = message_of(call)
    assert message.startswith(f"Expected {expected}")
    assert message.endswith(f"got {found}.")


@pytest.mark.parametrize("case", UNKNOWN_OPTIONS)
def test_an_unknown_option_is_answered_with_the_nearest_one(case):
    call, name, value, nearest = UNKNOWN_OPTIONS[case]
    message = message_of(call)
    assert message.startswith(f"Unknown {name} {value!r}. Did you mean {nearest!r}?")
    assert "Expected one of: " in message


def test_an_option_that_resembles_nothing_gets_the_list_alone():
    message = message_of(lambda: _validate.one_of("method", "xyz", ["normal", "both"]))
    assert message == "Unknown method 'xyz'. Expected one of: normal, both."


@pytest.mark.parametrize("value", [-1, 2])
def test_labels_out_of_range_are_named_with_their_place(value):
    labels = np.array([0, 1, value, 1, value])
    assert message_of(lambda: _validate.labels("labels", labels, 2)) == (
        f"Expected labels in [0, 2), got {value} at index 2 (2 in all).")


def test_labels_must_be_integers():
    message = message_of(lambda: _validate.labels("labels", np.array([0.0, 1.0]), 2))
    assert message == "Expected labels of an integer dtype, got float64."


def images_with(value):
    images = np.full((2, 4, 4, 1), 0.5, np.float32)
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(("images", "expected"), [
    (images_with(np.nan), "Expected images without NaN, got 1 of them."),
    (images_with(1.5), "Expected images with values in [0, 1], got [0.5, 1.5]."),
    (images_with(-0.25), "Expected images with values in [0, 1], got [-0.25, 0.5]."),
    (images_with(np.inf), "Expected images with values in [0, 1], got [0.5, inf]."),
    (images_with(0)[0], "Expected images of shape [N, H, W, channels], got (4, 4, 1)."),
    (images_with(0).astype(np.int32), "Expected images of dtype uint8 or floating, got int32."),
], ids=["nan", "above", "below", "infinite", "rank", "dtype"])
def test_images_that_cannot_be_used_are_described(images, expected):
    assert message_of(lambda: _validate.images("images", images)) == expected


def test_what_is_no_number_is_out_of_range():
    for value in ("0.5", None, np.zeros(2), [0.5]):
        assert message_of(lambda: _validate.in_range("x", value, 0, 1)) == (  # noqa: B023
            f"Expected x={value} in [0, 1).")


def test_what_is_no_array_is_named():
    assert message_of(lambda: _validate.shapes(x=([1.0], "B"))) == (
        "Expected x of shape [B], got a list, which is not an array.")
    assert message_of(lambda: _validate.class_numbers("labels", [[0], [1, 2]])) == (
        "Expected labels to be an array, got list of different lengths.")


def test_integers_of_numpy_are_integers():
    for value in (3, np.int64(3), np.uint8(3), np.array(3), jnp.array(3)):
        number = _validate.integer("x", value, 1)
        assert number == 3 and type(number) is int
    assert init_centroids(np.int64(2), np.int32(3)).mean.shape == (2, 3)
    assert geometry.class_dispersion(FEATURES, LABELS, np.int64(2)).shape == (2,)


def test_good_input_passes():
    _validate.labels("labels", np.array([0, 1, 1], np.uint8), 2)
    _validate.labels("labels", np.array([], np.int32), 2)
    _validate.images("images", PIXELS)
    _validate.images("images", images_with(1.0))
    _validate.images("images", images_with(0.0))
    _validate.in_range("closed", 1, 0, 1, open_high=False)
    _validate.one_of("option", "a", ["a", "b"])
    assert _validate.shapes(x=(PIXELS, "B ..."), y=(LABELS, "B")) == {"B": 4}
    for call in (compactness, margin, robust, make_batch, create):
        call()
    assert isinstance(training.sgd(optax.schedules.constant_schedule(0.0)),
                      optax.GradientTransformation)


def test_bounds_are_open_or_closed_as_said():
    for value in (0.0, 1.0):
        message_of(lambda: _validate.in_range(
            "x", value, 0, 1, open_low=True))  # noqa: B023
    _validate.in_range("x", 0.0, 0, 1)
    _validate.in_range("x", 0.5, 0, 1, open_low=True)
    assert "(0, 1]" in message_of(
        lambda: _validate.in_range("x", 0, 0, 1, open_low=True, open_high=False))


def test_shapes_are_checked_under_jit_too():
    with pytest.raises(InputError, match="labels of shape"):
        jax.jit(compactness)(FEATURES, LABELS[:3])
    with pytest.raises(InputError, match="kernel of shape"):
        jax.eval_shape(lambda kernel: margin(kernel=kernel), jnp.asarray(KERNEL.T))


def test_a_margin_of_directions_is_not_relative():
    message = message_of(lambda: RobustLossConfig(
        direction=True, delta_d=1.0, margin_relative=True))
    assert message == ("Expected margin_relative=False with direction=True, whose centroids have "
                       "norm 1, got True.")
