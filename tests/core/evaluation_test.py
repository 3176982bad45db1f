"""Accuracy under noise: every image counts once, whatever the batch size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import evaluation, models, parallel, perturbations
from jaxrobust._validate import InputError

SIZE = 23


@pytest.fixture(name="trained", scope="module")
def _trained():
    model = models.SmallCNN(num_classes=3, mean=(0.5,), std=(0.25,), num_features=4, width=2)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (SIZE, 8, 8, 1), np.uint8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    logits = evaluation.predict(model, variables, images).logits
    # Half of the labels are what the model says, half are not.
    labels = np.asarray((jnp.argmax(logits, -1) + np.arange(SIZE) % 2) % 3, np.int32)
    return model, variables, images, labels


def all_draws(trained, **options):
    return np.stack(list(evaluation.evaluate(*trained, key=jax.random.key(0), **options)))


def test_clean_images_are_counted_as_predicted(trained):
    correct = all_draws(trained, batch_size=5)
    np.testing.assert_array_equal(correct, [np.arange(SIZE) % 2 == 0])


def test_the_batch_size_makes_no_difference(trained):
    noise = perturbations.gaussian(0.3)
    results = [all_draws(trained, perturb=noise, num_draws=2, batch_size=batch_size)
               for batch_size in (1, 5, 23, 100)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_draws_are_independent_and_reproducible(trained):
    noise = perturbations.gaussian(0.5)
    once = all_draws(trained, perturb=noise, num_draws=4)
    again = all_draws(trained, perturb=noise, num_draws=4)
    np.testing.assert_array_equal(once, again)
    assert len({draw.tobytes() for draw in once}) > 1


def test_one_program_serves_all_noise_levels_and_one_network_all_perturbations(trained):
    for program in (evaluation._perturbed, evaluation._ranked):
        program.clear_cache()
    for std in (0.1, 0.2, 0.3):
        all_draws(trained, perturb=perturbations.gaussian(std), batch_size=8)
    assert evaluation._perturbed._cache_size() == 1
    all_draws(trained, perturb=perturbations.uniform(0.1), batch_size=8)
    all_draws(trained, batch_size=8)
    assert evaluation._perturbed._cache_size() == 3
    assert evaluation._ranked._cache_size() == 1


def test_a_prediction_is_right_if_its_argmax_is_the_label():
    images, labels = np.eye(4, dtype=np.float32).reshape(4, 2, 2, 1), np.array([0, 1, 3, 2])
    correct, = evaluation.evaluate(
        lambda images: images.reshape(images.shape[0], -1), images, labels, key=jax.random.key(0))
    np.testing.assert_array_equal(correct, [True, True, False, False])


def corner_pixels(images):
    """As logits of 3 classes, three of the pixels."""
    return 1.0 * images[:, 0, :3, 0]


def test_a_plain_function_is_evaluated_like_a_model(trained):
    model, variables, images, labels = trained
    noise = perturbations.gaussian(0.3)
    by_model = all_draws(trained, perturb=noise, num_draws=2, batch_size=8)
    functions = (lambda inputs: model.apply(variables, inputs, train=False).logits,
                 jax.tree_util.Partial(
                     lambda variables, inputs: model.apply(variables, inputs, train=False).logits,
                     variables))
    for logits_fn in functions:
        np.testing.assert_array_equal(by_model, list(evaluation.evaluate(
            logits_fn, images, labels, perturb=noise, key=jax.random.key(0), num_draws=2,
            batch_size=8)))


def test_a_plain_function_perturbs_too():
    images = np.zeros((5, 4, 4, 1), np.float32)
    images[:, 0, 1] = 1
    flipped, = evaluation.evaluate(
        corner_pixels, images, np.array([0, 1, 2, 1, 0]), key=jax.random.key(0),
        perturb=lambda key, images: images[:, :, np.array([1, 0, 2, 3])])
    np.testing.assert_array_equal(flipped, [True, False, False, False, True])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["jit", "mesh"])
def test_images_with_logits_that_are_not_finite_are_an_error_with_their_number(wrong, form):
    images = np.zeros((SIZE, 8, 8, 1), np.float32)
    images[[4, 9, 22], 0, 0] = 1

    def logits_fn(images):
        return jnp.where(images[:, 0, :3, 0] == 1, wrong, 0.0)

    draws = evaluation.evaluate(
        logits_fn, images, np.zeros(SIZE, np.int32), key=jax.random.key(0), batch_size=8,
        layout=parallel.make_layout(form))
    with pytest.raises(InputError, match="NaN or infinite ones for 3 of 23 images, the first at "
                                         "index 4"):
        next(draws)


def test_a_label_that_is_no_class_is_an_error(trained):
    model, variables, images, labels = trained
    for label in (-1, 3):
        wrong = np.where(np.isin(np.arange(SIZE), (7, 8)), label, labels)
        with pytest.raises(InputError, match=f"got {label} at index 7 \\(2 in all\\)"):
            next(evaluation.evaluate(model, variables, images, wrong, key=jax.random.key(0)))


def test_bad_arguments_are_named_before_anything_is_drawn(trained):
    model, variables, images, labels = trained
    for message, arguments, options in (
            (r"Expected labels of shape \[N\] with N=23, got \(22,\)",
             (model, variables, images, labels[1:]), {}),
            (r"Expected images of shape \[N, ...\], no size 0",
             (model, variables, images[:0], labels[:0]), {}),
            ("Expected labels of an integer dtype, got bool",
             (model, variables, images, labels == 0), {}),
            (r"Expected images with values in \[0, 1\]",
             (model, variables, images.astype(np.float32), labels), {}),
            (r"Expected evaluate\(model, variables, images, labels, key=...\), got 3 arguments",
             (model, images, labels), {}),
            (r"Expected evaluate\(logits_fn, images, labels, key=...\), got 4 arguments",
             (corner_pixels, variables, images, labels), {}),
            ("Expected a Flax Linen module or a function of images to evaluate, got a dict",
             (variables, images, labels), {}),
            ("Expected num_draws=0 to be an integer", trained, {"num_draws": 0}),
            ("Expected batch_size=2.5 to be an integer", trained, {"batch_size": 2.5})):
        with pytest.raises(InputError, match=message):
            evaluation.evaluate(*arguments, key=jax.random.key(0), **options)
    with pytest.raises(InputError, match="Expected array 0 of shape .* no size 0"):
        evaluation.map_batches(lambda rows: rows, images[:0], batch_size=3)
    with pytest.raises(InputError, match="Expected batch_size=0 to be an integer >= 1"):
        evaluation.map_batches(lambda rows: rows, images, batch_size=0)


def test_what_returns_no_logits_is_named(trained):
    _, _, images, labels = trained

    class Bare(nn.Module):

        def __call__(self, images, *, train):
            return images[:, 0, :3, 0]

    for arguments, message in (
            ((Bare(), {}), "returns jaxrobust.models.Outputs, got one that returns a DynamicJaxpr"),
            ((lambda images: images[:, 0, 0, 0],), r"Expected logits of shape \[B, C\]")):
        with pytest.raises(InputError, match=message):
            next(evaluation.evaluate(*arguments, images, labels, key=jax.random.key(0)))


def test_integers_of_numpy_are_taken(trained):
    draws = all_draws(trained, num_draws=np.int64(2), batch_size=np.int64(8))
    assert draws.shape == (2, SIZE)
