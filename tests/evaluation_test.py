"""Accuracy under noise: every image counts once, whatever the batch size."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import evaluation, models, perturbations
from jaxrobust._validate import InputError

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


def test_one_program_serves_all_noise_levels(trained):
    evaluation._correct.clear_cache()
    for std in (0.1, 0.2, 0.3):
        all_draws(trained, perturb=perturbations.gaussian(std), batch_size=8)
    assert evaluation._correct._cache_size() == 1


class CorrectPredictions(chex.TestCase):

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_is_argmax_against_label(self):
        def logits_fn(images):
            return images.reshape(images.shape[0], -1)

        images = jnp.eye(4).reshape(4, 2, 2, 1)
        labels = jnp.array([0, 1, 3, 2])

        @self.variant
        def correct(images, labels, indices):
            return evaluation.correct_predictions(
                logits_fn, images, labels, perturb=perturbations.identity(),
                key=jax.random.key(0), indices=indices)

        np.testing.assert_array_equal(
            correct(images, labels, jnp.arange(4)), [True, True, False, False])


def test_bad_arguments_are_named(trained):
    model, variables, images, labels = trained
    with pytest.raises(InputError, match=r"Expected labels of shape \[N\] with N=23, got \(22,\)"):
        next(evaluation.evaluate(model, variables, images, labels[1:], key=jax.random.key(0)))
    with pytest.raises(InputError, match="Expected number of images=0"):
        next(evaluation.evaluate(model, variables, images[:0], labels[:0], key=jax.random.key(0)))
