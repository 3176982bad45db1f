"""Attacks, against closed forms of linear classifiers, transcriptions in NumPy, and each other."""

import functools
import importlib.util
import pathlib
import types

import hypothesis
import jax
import jax.numpy as jnp
import markdown
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrobust import InputError, _eager, attacks, losses
from jaxrobust.attacks import boundary, common, gradient, square

KEY = jax.random.key(0)
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md"
NORMS = ("linf", "l2")
RADII = {"linf": 0.06, "l2": 0.4}
"""At which the network below keeps a part of its images."""
FOOLBOX = importlib.util.find_spec("foolbox") is not None
FOOLBOX_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
"""It imports what is deprecated."""


def norms_of(norm, perturbations):
    flat = np.asarray(perturbations, np.float64).reshape(len(perturbations), -1)
    return np.linalg.norm(flat, np.inf if norm == "linf" else 2, axis=1)


def right(logits_fn, images, labels):
    return np.argmax(logits_fn(jnp.asarray(images)), axis=1) == labels


def survivors(logits_fn, images, labels):
    return int(right(logits_fn, images, labels).sum())


@pytest.fixture(name="network", scope="module")
def _network(digits):
    """Logits of a network of one hidden layer, trained on the digits, and test images with labels
    that it gets right."""
    images, labels = digits.train.images / np.float32(255), digits.train.labels

    def logits_fn(parameters, x):
        first, second = parameters
        return jax.nn.relu(x.reshape(len(x), -1) @ first) @ second

    @jax.jit
    def train(parameters, images, labels):
        def loss(parameters):
            return jnp.mean(losses.softmax_cross_entropy(logits_fn(parameters, images), labels))

        def step(_, parameters):
            return jax.tree.map(lambda p, g: p - 1.0 * g, parameters, jax.grad(loss)(parameters))

        return jax.lax.fori_loop(0, 200, step, parameters)

    draw = np.random.default_rng(0)
    parameters = tuple(jnp.asarray(draw.normal(size=shape) / shape[0]**0.5, jnp.float32)
                       for shape in ((64, 24), (24, 10)))
    parameters = train(parameters, jnp.asarray(images), jnp.asarray(labels))
    logits = functools.partial(logits_fn, parameters)
    tested, truth = digits.test.images / np.float32(255), digits.test.labels
    known = np.flatnonzero(right(logits, tested, truth))
    assert len(known) > 0.9 * len(truth)
    return logits, tested[known[:40]], truth[known[:40]]


def run(name, logits_fn, images, labels, norm, epsilon, **options):
    """An attack by name, with few steps."""
    if name == "fgsm":
        return attacks.fgsm(logits_fn, images, labels, norm=norm, epsilon=epsilon)
    if name == "square":
        return attacks.square_attack(logits_fn, images, labels, KEY, norm=norm, epsilon=epsilon,
                                     num_queries=60, **options)
    attack = attacks.pgd if name == "pgd" else attacks.apgd
    return attack(logits_fn, images, labels, KEY, norm=norm, epsilon=epsilon, num_steps=8,
                  **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "square"])
@hypothesis.settings(max_examples=12)
@hypothesis.given(epsilon=st.floats(0, 3, width=32), seed=st.integers(0, 99))
def test_attacked_images_stay_in_the_ball_and_in_the_range(network, name, norm, epsilon, seed):
    logits_fn, _, labels = network
    draw = np.random.default_rng(seed)
    images = draw.uniform(size=(6, 8, 8, 1)).astype(np.float32)
    images[:2] = draw.integers(0, 2, size=(2, 8, 8, 1))  # At the edges of the range.
    attacked = np.asarray(run(name, logits_fn, images, labels[:6], norm, epsilon))
    assert attacked.dtype == np.float32
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert norms_of(norm, attacked.astype(np.float64) - images).max() <= epsilon + 1e-6
    if epsilon == 0:
        np.testing.assert_array_equal(attacked, images)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["pgd", "apgd", "square"])
def test_padding_is_returned_as_it_is_and_the_batch_does_not_count(network, name, norm):
    logits_fn, images, labels = network
    together = run(name, logits_fn, images[:8], labels[:8], norm, RADII[norm])
    assert np.all(norms_of(norm, together - images[:8]) > 0)
    rows = np.array([6, 2, 3, 3])
    for padding in (-1, 10):
        padded = np.append(labels[rows[:3]], padding).astype(np.int32)
        alone = run(name, logits_fn, images[rows], padded, norm, RADII[norm], indices=rows)
        np.testing.assert_array_equal(alone[3], images[3])
        np.testing.assert_allclose(alone[:3], together[rows[:3]], atol=1e-6)


def test_a_step_of_fgsm_is_one_of_pgd(network):
    logits_fn, images, labels = network
    for norm in NORMS:
        epsilon = RADII[norm] / 4  # So small that the loss rises along the gradient.
        once = attacks.fgsm(logits_fn, images, labels, norm=norm, epsilon=epsilon)
        np.testing.assert_allclose(attacks.pgd(
            logits_fn, images, labels, KEY, norm=norm, epsilon=epsilon, num_steps=1,
            step_size=epsilon, random_start=False), once, atol=1e-7)
        own = jax.grad(lambda x: jnp.sum(losses.softmax_cross_entropy(  # noqa: B023
            logits_fn(x), jnp.asarray(labels))))(jnp.asarray(images))
        change = np.sign(own) if norm == "linf" else own / norms_of(norm, own).reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(once, np.clip(images + epsilon * change, 0, 1), atol=1e-6)


def linear(num_classes, seed=0):
    """A linear classifier of 6 x 6 images, images about 0.5 with the classes it gives them, and by
    norm the distances to the nearest other class; the box is far away."""
    draw = np.random.default_rng(seed)
    kernel = draw.normal(size=(36, num_classes))
    images = draw.uniform(0.4, 0.6, size=(12, 6, 6, 1)).astype(np.float32)
    logits = (images.reshape(12, -1) - 0.5) @ kernel
    labels = logits.argmax(axis=1).astype(np.int32)
    gap = logits[np.arange(12), labels][:, None] - logits
    normal = kernel[:, labels].T[:, :, None] - kernel[None]  # [B, 36, C]
    others = np.arange(num_classes) != labels[:, None]
    distances = {norm: np.min(np.where(others, gap, np.inf) / np.where(others, np.linalg.norm(
        normal, order, axis=1), 1), axis=1) for norm, order in (("linf", 1), ("l2", 2))}
    kernel = jnp.asarray(kernel, jnp.float32)
    return lambda x: (x - 0.5).reshape(len(x), -1) @ kernel, images, labels, distances


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_flips_a_linear_classifier_of_two_classes_from_the_closed_distance_on(norm):
    logits_fn, images, labels, distances = linear(2)
    flips = []
    for epsilon in np.quantile(distances[norm], [0.2, 0.5, 0.8]):
        for factor in (0.98, 1.02):
            attacked = attacks.pgd(logits_fn, images, labels, KEY, norm=norm,
                                   epsilon=float(epsilon * factor), num_steps=40)
            wrong = ~right(logits_fn, attacked, labels)
            flips.append(int(wrong.sum()))
            sure = np.abs(distances[norm] / (epsilon * factor) - 1) > 0.01
            np.testing.assert_array_equal(
                wrong[sure], (distances[norm] < epsilon * factor)[sure])
    assert len(set(flips)) > 2


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_closed_distance_of_a_linear_classifier(norm):
    logits_fn, images, labels, distances = linear(4)
    labels = labels.copy()
    labels[1], labels[2] = -1, (labels[2] + 1) % 4
    nearest, found = attacks.fab(logits_fn, images, labels, norm=norm, num_steps=20)
    np.testing.assert_array_equal(found[:3][1:], [np.inf, 0])
    np.testing.assert_array_equal(nearest[1:3], images[1:3])
    rest = np.delete(np.arange(12), [1, 2])
    np.testing.assert_allclose(found[rest], distances[norm][rest], rtol=1e-3)
    np.testing.assert_allclose(norms_of(norm, nearest - images)[rest], found[rest], rtol=1e-5)
    assert not right(logits_fn, nearest[rest], labels[rest]).any()


def projection_in_float64(norm, x, w, b):
    """The step to the hyperplane by bisection over its length, in float64."""
    w, b = (w, b) if b >= 0 else (-w, -b)
    room, speed = np.where(w > 0, 1 - x, x), np.abs(w) if norm == "l2" else np.sign(np.abs(w))
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        short = np.sum(np.abs(w) * np.minimum(middle * speed, room)) < b
        low, high = (middle, high) if short else (low, middle)
    return np.where(w == 0, 0, np.sign(w) * np.minimum(high * speed, room))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("shape", [(2, 5), (20, 50)])
def test_the_projection_to_a_hyperplane_within_the_box(norm, scale, shape):
    draw = np.random.default_rng(3)
    x, w = draw.uniform(size=(24, *shape)), draw.normal(size=(24, *shape)) * scale
    x[:6] = draw.integers(0, 2, size=(6, *shape))
    w[::3, 0, :2] = 0
    w[-1] = 0
    reach = np.abs(w).sum(axis=(1, 2))
    b = draw.uniform(-1, 1, size=24) * reach  # Many are beyond what the box allows.
    found = boundary.to_hyperplane(norm, *(jnp.asarray(a, jnp.float32) for a in (x, w, b)))
    expected = [projection_in_float64(norm, *(a.ravel() for a in row))
                for row in zip(x, w / scale, b / scale, strict=True)]
    np.testing.assert_allclose(found.reshape(24, -1), expected, atol=2e-5)


def dlr_in_float64(logits, label, target=None):
    z = np.sort(logits)[::-1]
    if target is not None:
        return -(logits[label] - logits[target]) / (z[0] - (z[2] + z[3]) / 2)
    return -(logits[label] - np.delete(logits, label).max()) / (z[0] - z[2])


def test_dlr_losses_are_those_of_the_paper_and_have_no_scale():
    draw = np.random.default_rng(0)
    logits, targets = draw.normal(size=(8, 5)), draw.integers(0, 5, 8)
    labels = np.append(draw.integers(0, 5, 6), [-1, 5]).astype(np.int32)
    expected = np.zeros((8, 2))
    for i in range(6):
        expected[i] = (dlr_in_float64(logits[i], labels[i]),
                       dlr_in_float64(logits[i], labels[i], targets[i]))

    def both(scale, shift):
        z = jnp.asarray(scale * logits + shift, jnp.float32)
        return np.stack([attacks.dlr_loss(z, labels), attacks.targeted_dlr_loss(
            z, labels, jnp.asarray(targets, jnp.int32))], axis=1)

    np.testing.assert_allclose(both(1, 0), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(both(1e-3, 0.5), both(1, 0), rtol=1e-3, atol=1e-6)
    for loss, classes in ((attacks.dlr_loss, 2), (
            functools.partial(attacks.targeted_dlr_loss, targets=jnp.zeros(1, jnp.int32)), 3)):
        with pytest.raises(InputError, match=f"number of classes={classes}"):
            loss(jnp.ones((1, classes)), jnp.zeros(1, jnp.int32))


def test_checkpoints_of_apgd_are_those_of_the_paper():
    windows = gradient.checkpoints(100)
    assert np.flatnonzero(windows).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert windows[windows > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_stronger_attacks_leave_fewer_images(network, norm):
    logits_fn, images, labels = network
    ball = {"norm": norm, "epsilon": RADII[norm]}
    start = attacks.pgd(logits_fn, images, labels, KEY, num_steps=20, **ball)
    left = {"fgsm": survivors(logits_fn, attacks.fgsm(logits_fn, images, labels, **ball), labels),
            "pgd": survivors(logits_fn, start, labels)}
    for loss in ("cross_entropy", "dlr", "targeted_dlr"):
        attacked = attacks.apgd(
            logits_fn, images, labels, KEY, num_steps=20, loss=loss, **ball)
        left[loss] = survivors(logits_fn, attacked, labels)
        if loss == "cross_entropy":
            mean = [float(jnp.mean(losses.softmax_cross_entropy(logits_fn(x), labels)))
                    for x in (attacked, start)]
            assert mean[0] >= 0.99 * mean[1]
    distance = attacks.fab(logits_fn, images, labels, norm=norm, num_steps=30)[1]
    left["fab"] = int((np.asarray(distance) > RADII[norm]).sum())
    assert 0 < left["pgd"] < len(labels), left
    assert left["pgd"] <= left["fgsm"], left
    assert max(left["cross_entropy"], left["targeted_dlr"], left["fab"]) <= left["pgd"], left
    assert left["dlr"] <= left["fgsm"], left


def test_more_restarts_and_more_steps_of_one_size_never_help_the_defender(network):
    logits_fn, images, labels = network

    def loss(**options):
        attacked = attacks.pgd(logits_fn, images, labels, KEY, norm="linf", epsilon=0.06,
                               step_size=0.02, **options)
        return np.asarray(losses.softmax_cross_entropy(logits_fn(attacked), labels)), right(
            logits_fn, attacked, labels)

    base, base_right = loss(num_steps=5)
    for options in ({"num_steps": 5, "num_restarts": 3}, {"num_steps": 9}):
        more, more_right = loss(**options)
        assert not (more_right & ~base_right).any()
        assert np.all(more[base_right == more_right] >= base[base_right == more_right] - 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_square_needs_no_gradients(network, norm):
    logits_fn, images, labels = network
    shape = jax.ShapeDtypeStruct((len(images), 10), jnp.float32)

    def hidden(x):  # Of no gradient: to differentiate it is an error.
        return jax.pure_callback(lambda x: np.asarray(logits_fn(x), np.float32), shape, x)

    with pytest.raises(ValueError, match="callback"):
        attacks.fgsm(hidden, images, labels, norm=norm, epsilon=0.1)
    epsilon = 3 * RADII[norm]
    few, many = (survivors(logits_fn, attacks.square_attack(
        logits_fn, images, labels, KEY, norm=norm, epsilon=epsilon, num_queries=number), labels)
        for number in (1, 300))
    assert many < 0.5 * few
    attacked = attacks.square_attack(
        hidden, images, labels, KEY, norm=norm, epsilon=epsilon, num_queries=20)
    assert survivors(logits_fn, attacked, labels) < len(labels)


def test_windows_of_square_shrink_as_published():
    numbers = np.array([0, 10, 11, 50, 51, 200, 201, 501, 1001, 2001, 4001, 6001, 8001])
    found = [int(square.halvings(jnp.int32(number))) for number in numbers]
    assert found == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    assert square._sides(32, 32).tolist() == [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]
    assert square._sides(8, 6).max() == 5
    for side in (3, 5, 8):
        pattern = square._pattern(side)
        np.testing.assert_allclose([np.linalg.norm(pattern), pattern[0].max() > 0], 1, rtol=1e-6)
        assert (pattern[:side // 2] >= 0).all() and (pattern[side // 2:] <= 0).all()


def test_each_channel_passes_on_its_own_mass_in_squares_of_l2():
    image = jnp.full((5, 5, 3), 0.5)
    change = np.random.default_rng(0).normal(size=image.shape) * np.array([3, 1, 0.2])
    change = jnp.asarray(0.3 * change / np.linalg.norm(change), jnp.float32)
    old = jnp.sum(jnp.square(change), axis=(0, 1))
    for epsilon in (0.3, 0.5):  # Nothing is left, and something that the channels share.
        proposed = square._propose_l2(KEY, image, image + change, epsilon, 0)  # One window: all.
        np.testing.assert_allclose(jnp.sum(jnp.square(proposed - image), axis=(0, 1)),
                                   old + (epsilon**2 - 0.3**2) / 3, rtol=1e-4)


def test_attacks_under_jit_are_those_without(network):
    logits_fn, images, labels = network
    for name, norm in (("pgd", "l2"), ("apgd", "linf"), ("square", "linf")):
        attack = functools.partial(run, name, logits_fn, labels=labels[:8], norm=norm,
                                   epsilon=RADII[norm])
        np.testing.assert_allclose(jax.jit(lambda x: attack(images=x))(images[:8]),  # noqa: B023
                                   attack(images=images[:8]), atol=1e-5)


def test_a_second_attack_compiles_nothing_and_sees_what_has_changed():
    def attack(sign, epsilon, num_steps):
        kernel = sign * jnp.array([[1.0, -1.0]])
        return attacks.pgd(lambda x: x.reshape(2, -1) @ kernel, jnp.full((2, 1, 1, 1), 0.5),
                           np.zeros(2, np.int32), KEY, norm="linf", epsilon=epsilon,
                           num_steps=num_steps).ravel()

    np.testing.assert_allclose(attack(1.0, 0.25, 4), 0.25)
    before = _eager._run._cache_size()
    np.testing.assert_allclose(attack(-1.0, 0.125, 6), 0.625)
    assert _eager._run._cache_size() == before


def test_a_classifier_that_holds_its_parameters_is_traced_once():
    traced = []

    def linear(kernel, x):
        traced.append(x)
        return x.reshape(2, -1) @ kernel

    def attack(sign):
        return attacks.pgd(
            jax.tree_util.Partial(linear, sign * jnp.array([[1.0, -1.0]])),
            jnp.full((2, 1, 1, 1), 0.5), np.zeros(2, np.int32), KEY, norm="linf", epsilon=0.25,
            num_steps=4).ravel()

    np.testing.assert_allclose(attack(1.0), 0.25)
    first = len(traced)
    np.testing.assert_allclose(attack(-1.0), 0.75)
    assert len(traced) == first > 0


def test_logits_that_are_not_finite_are_counted(network):
    logits_fn, images, labels = network
    broken = images.copy()
    broken[[3, 5], 0, 0] = 1

    def with_nan(x):
        return jnp.where((x[:, 0, 0] > 0.99), jnp.nan, logits_fn(x))

    assert not (images[:, 0, 0] > 0.5).any()
    for call in (
            lambda x: attacks.fgsm(with_nan, x, labels, norm="linf", epsilon=0.01),
            lambda x: attacks.pgd(with_nan, x, labels, KEY, norm="l2", epsilon=0.01, num_steps=2),
            lambda x: attacks.fab(with_nan, x, labels, norm="l2", num_steps=2),
            lambda x: attacks.auto_attack(with_nan, x, labels, KEY, norm="l2", epsilon=0.01)):
        with pytest.raises(InputError, match=r"NaN or infinite ones for 2 of \d+ images, the first "
                                             "at index 3"):
            call(broken)


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_not_finite_counts_as_zero(norm):
    def standardised(x):
        flat = x.reshape(len(x), -1)
        scale = jnp.std(flat, axis=1, keepdims=True) + 1e-5  # Without a derivative at 0.
        flat = (flat - flat.mean(axis=1, keepdims=True)) / scale
        return jnp.stack([flat[:, 0] + 0.1, -flat[:, 0]], axis=1)

    images = np.full((2, 4, 4, 1), 0.5, np.float32)  # The first of one colour, unlike the second.
    images[1] = np.linspace(0.4, 0.6, 16).reshape(4, 4, 1)[::-1]
    labels = np.zeros(2, np.int32)
    gradient = jax.grad(lambda x: standardised(x).sum())(jnp.asarray(images))
    assert np.isnan(gradient[0]).any() and np.isfinite(gradient[1]).all()
    fast = attacks.fgsm(standardised, images, labels, norm=norm, epsilon=0.01)
    walked = attacks.pgd(standardised, images, labels, KEY, norm=norm, epsilon=0.01, num_steps=3,
                         random_start=False)
    for attacked in (fast, walked):
        np.testing.assert_array_equal(attacked[0], images[0])
        assert 0 < norms_of(norm, attacked - images)[1] <= 0.01 + 1e-6
    nearest, distance = attacks.fab(standardised, images, labels, norm=norm, num_steps=5)
    assert np.isfinite(nearest).all() and np.isinf(distance[0]) and np.isfinite(distance[1])
    ensemble = attacks.auto_attack(standardised, images[:1], labels[:1], KEY, norm=norm,
                                   epsilon=0.0, num_steps=2, num_queries=1)
    assert "zero_gradients" in ensemble.warnings and ensemble.zero_gradients > 0


def test_bad_arguments_are_named(network):
    logits_fn, images, labels = network
    pgd = functools.partial(attacks.pgd, logits_fn, key=KEY, norm="l2", epsilon=1, num_steps=1)
    for call, message in (
            (lambda: pgd(images, labels, norm="l1"), "Unknown norm 'l1'"),
            (lambda: pgd(images, labels, epsilon=-1), "epsilon=-1"),
            (lambda: pgd(images, labels, num_steps=0), "num_steps=0"),
            (lambda: pgd(images, labels, num_restarts=1.5), "num_restarts=1.5"),
            (lambda: pgd(images, labels, step_size=0), "step_size=0"),
            (lambda: pgd(images * 255, labels), r"images with values in \[0, 1\]"),
            (lambda: pgd(images, labels[:3]), "labels of shape"),
            (lambda: pgd(images, labels, indices=np.arange(3)), "indices of shape"),
            (lambda: attacks.apgd(logits_fn, images, labels, KEY, norm="l2", epsilon=1,
                                  loss="dl"), "Did you mean 'dlr'"),
            (lambda: attacks.Randomised(logits_fn, 0), "num_draws=0"),
            (lambda: attacks.Randomised(logits_fn, chunk_size=0), "chunk_size=0"),
            (lambda: attacks.fab(attacks.Randomised(logits_fn), images, labels, norm="l2"),
             "deterministic logits_fn"),
            (lambda: attacks.auto_attack(logits_fn, images, labels * 0 - 1, KEY, norm="l2",
                                         epsilon=1), r"labels in \[0, 10\)")):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.slow
def test_randomised_classifiers_are_attacked_through_means_over_their_draws(network):
    logits_fn, images, labels = network

    def scaled(key, x):  # Sometimes of the wrong class, which no single draw may decide.
        return jnp.where(jax.random.uniform(key) < 1 / 8, -1.0, 1.0) * logits_fn(x)

    randomised = attacks.Randomised(scaled, 8, chunk_size=3)
    problem = common.prepare(images, labels, KEY, norm="l2", epsilon=0, indices=None)
    objective = gradient.OBJECTIVES["cross_entropy"]
    drawn, mean = jax.jit(lambda problem: common.evaluate_with_gradient(
        randomised, objective, problem, problem.images, problem.keys))(problem)
    assert not drawn.wrong.any()
    two = [common.evaluate_with_gradient(lambda x: sign * logits_fn(x), objective, problem,  # noqa: B023
                                         problem.images, problem.keys) for sign in (1, -1)]
    share = (drawn.loss - two[0][0].loss) / (two[1][0].loss - two[0][0].loss)
    assert np.all(np.abs(share * 8 - np.round(share * 8)) < 0.05)
    assert abs(float(jnp.mean(share)) - 1 / 8) < 0.05 and len(np.unique(np.round(share, 3))) > 2
    share = share[:, None, None, None]
    np.testing.assert_allclose(
        mean, (1 - share) * two[0][1] + share * two[1][1], rtol=1e-2, atol=1e-3)

    def noisy(key, x):
        return logits_fn(x + 0.05 * jax.random.normal(key, x.shape))

    attacked = attacks.pgd(attacks.Randomised(noisy, 4), images, labels, KEY, norm="linf",
                           epsilon=0.12, num_steps=8)
    assert survivors(logits_fn, attacked, labels) < 0.5 * len(labels)
    result = attacks.auto_attack(attacks.Randomised(noisy, 4), images, labels, KEY, norm="linf",
                                 epsilon=0.06, num_steps=8)
    assert list(result.accuracy) == ["clean", "apgd-ce", "apgd-dlr"] and not result.warnings
    assert 0 < result.accuracy["apgd-dlr"] < 0.9


def ensemble(logits_fn, images, labels, norm="linf", epsilon=0.06, **options):
    return attacks.auto_attack(logits_fn, images, labels, KEY, norm=norm, epsilon=epsilon,
                               num_steps=10, num_queries=100, **options)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_an_image_is_robust_if_every_attack_of_the_ensemble_fails(network, norm):
    logits_fn, images, labels = network
    labels = labels.copy()
    labels[0], labels[1] = (labels[0] + 1) % 10, -1
    result = ensemble(logits_fn, images, labels, norm, RADII[norm], batch_size=16)
    assert list(result.accuracy) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    values = np.array(list(result.accuracy.values()))
    assert values[0] == 38 / 39 and np.all(np.diff(values) <= 0) and 0 < values[-1] < 0.9
    assert values[-1] == result.robust.sum() / 39
    assert norms_of(norm, result.images - images).max() <= RADII[norm] + 1e-6
    broken = (result.broken_by != "") & (labels >= 0)
    np.testing.assert_array_equal(broken, ~result.robust & (labels >= 0))
    np.testing.assert_array_equal(right(logits_fn, result.images, labels), result.robust)
    assert result.broken_by[0] == "clean" and result.broken_by[1] == ""
    np.testing.assert_array_equal(result.images[result.robust], images[result.robust])
    for name in ("pgd", "apgd"):
        alone = right(logits_fn, run(name, logits_fn, images, labels, norm, RADII[norm]), labels)
        assert not (result.robust & ~alone).any()
    assert not result.warnings
    if norm == "linf":
        other = ensemble(logits_fn, images, labels, norm, RADII[norm], batch_size=39)
        np.testing.assert_array_equal(other.robust, result.robust)
        assert other.accuracy == result.accuracy


@pytest.mark.slow
def test_the_ensemble_warns_as_autoattack_does(network):
    logits_fn, images, labels = network
    images, labels = images[:16], labels[:16]
    found = {name: ensemble(classifier, images, truth, epsilon=0.12, batch_size=16).warnings
             for name, classifier, truth in (
                 ("probabilities", lambda x: jax.nn.softmax(logits_fn(x)), labels),
                 ("masked", lambda x: logits_fn(jnp.round(20 * x) / 20), labels),
                 ("few", lambda x: logits_fn(x)[:, :3], np.where(labels < 3, labels, -1)))}
    assert set(found["probabilities"]) == {"probabilities"}
    assert set(found["masked"]) == {"zero_gradients", "black_box"}
    assert set(found["few"]) == {"few_classes"}

    draw = np.random.default_rng(0)

    def random(x):
        @jax.custom_jvp
        def noise(x):
            return jax.pure_callback(lambda x: draw.normal(size=(len(x), 10)).astype(np.float32),
                                     jax.ShapeDtypeStruct((len(x), 10), jnp.float32), x)

        noise.defjvp(lambda primals, tangents: (noise(*primals), jnp.zeros((len(x), 10))))
        return logits_fn(x) + 0.1 * noise(x)

    assert "random" in ensemble(random, images, labels, batch_size=16).warnings


def test_masking_checks_say_where_more_of_an_attack_helps_the_defender(network):
    logits_fn, images, labels = network
    found = attacks.masking_checks(
        logits_fn, images, labels, KEY, norm="linf", epsilon=0.06, num_steps=5)
    assert [check.name for check in found] == ["iterations", "steps", "restarts", "radius"]
    assert not any(check.helped_defender for check in found)
    assert found[1].weaker > found[3].stronger

    start = jnp.asarray(images)

    def aware(x):  # Wrong at a small distance alone; one step of PGD at a larger radius misses it.
        off = jnp.max(jnp.abs(x - start), axis=(1, 2, 3))
        rises = jnp.sum(x, axis=(1, 2, 3)) * 1e-3
        wrong = jnp.where((off > 0.05) & (off < 0.08), 1.0, -1.0) + rises
        return jnp.stack([jnp.zeros_like(wrong), wrong], axis=1)

    checks = attacks.masking_checks(aware, images, np.zeros(len(images), np.int32), KEY,
                                    norm="linf", epsilon=0.06, num_steps=1)
    assert {check.name: check.helped_defender for check in checks}["radius"]


@pytest.mark.slow
@FOOLBOX_WARNS
def test_the_examples_of_the_docs_run(network):
    logits_fn, images, labels = network
    own, _, with_foolbox = markdown.program(
        PAGE.read_text(), "Adversarial attacks").partition("import foolbox")
    model = types.SimpleNamespace(apply=lambda variables, images, train: types.SimpleNamespace(
        logits=logits_fn(images)))
    names = {"model": model, "variables": {}, "images": jnp.asarray(images[:3]),
             "labels": jnp.asarray(labels[:3])}
    exec(own, names)
    assert names["result"].accuracy["clean"] > 0 and names["distance"].shape == (3,)
    if FOOLBOX:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            exec(f"import foolbox{with_foolbox}", names)
        assert names["success"].shape == (2, 3)


@pytest.mark.skipif(not FOOLBOX, reason="needs foolbox")
@pytest.mark.parametrize("norm", NORMS)
@FOOLBOX_WARNS
def test_attacks_are_at_least_as_strong_as_those_of_foolbox(network, norm):
    import foolbox

    logits_fn, images, labels = network
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = foolbox.models.JAXModel(logits_fn, bounds=(0, 1))
        theirs = {"pgd": foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD,
                  "fgsm": foolbox.attacks.LinfFastGradientAttack if norm == "linf"
                  else foolbox.attacks.L2FastGradientAttack}
        left = {}
        for name, attack in theirs.items():
            attack = attack(steps=20, rel_stepsize=2.5 / 20) if name == "pgd" else attack()
            _, attacked, _ = attack(
                model, jnp.asarray(images), jnp.asarray(labels), epsilons=RADII[norm])
            left[name] = survivors(logits_fn, attacked, labels)
        deepfool = (foolbox.attacks.LinfDeepFoolAttack if norm == "linf"
                    else foolbox.attacks.L2DeepFoolAttack)(steps=50, candidates=10)
        _, nearest, _ = deepfool(model, jnp.asarray(images), jnp.asarray(labels), epsilons=None)
    own = attacks.pgd(logits_fn, images, labels, KEY, norm=norm, epsilon=RADII[norm], num_steps=20)
    assert survivors(logits_fn, own, labels) <= left["pgd"] < len(labels)
    own = attacks.fgsm(logits_fn, images, labels, norm=norm, epsilon=RADII[norm])
    assert survivors(logits_fn, own, labels) == left["fgsm"]
    distance = np.where(right(logits_fn, nearest, labels), np.inf,
                        norms_of(norm, nearest - images))
    own = np.asarray(attacks.fab(logits_fn, images, labels, norm=norm, num_steps=50)[1])
    print(norm, "survivors of Foolbox", left, "mean distance of DeepFool and FAB",
          np.mean(distance), np.mean(own))
    assert np.mean(own <= 1.001 * distance) >= 0.95
    assert np.mean(own) < np.mean(distance)
