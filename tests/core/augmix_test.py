"""AugMix: its operations against Pillow's, its mixtures, and its divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxrobust._validate import InputError
from jaxrobust.methods import augmix

HEIGHT, WIDTH = 24, 32
OPERATIONS = ("autocontrast", "equalize", "posterize", "solarize", "rotate", "shear_x", "shear_y",
              "translate_x", "translate_y")


def picture():
    """A smooth image of 8 bits with much of the range, and a constant channel."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(20, 200, (4, 5, 3), dtype=np.uint8))
    image = np.array(coarse.resize((WIDTH, HEIGHT), Image.BICUBIC))
    image[..., 2] = 77
    return image


def by_pillow(image, name, level, sign):
    """As in the authors' release."""
    image = Image.fromarray(image)
    numbers = {"shear_x": (1, sign * 0.03 * level, 0, 0, 1, 0),
               "shear_y": (1, 0, 0, sign * 0.03 * level, 1, 0),
               "translate_x": (1, 0, sign * int(level * (WIDTH / 3) / 10), 0, 1, 0),
               "translate_y": (1, 0, 0, 0, 1, sign * int(level * (HEIGHT / 3) / 10))}
    if name in numbers:
        return image.transform(image.size, Image.AFFINE, numbers[name], resample=Image.BILINEAR)
    return {"autocontrast": lambda: ImageOps.autocontrast(image),
            "equalize": lambda: ImageOps.equalize(image),
            "posterize": lambda: ImageOps.posterize(image, 4 - int(level * 4 / 10)),
            "solarize": lambda: ImageOps.solarize(image, 256 - int(level * 256 / 10)),
            "rotate": lambda: image.rotate(sign * int(level * 30 / 10), resample=Image.BILINEAR),
            }[name]()


def test_operations_are_pillows():
    image = picture()
    operate = jax.jit(augmix.operate)
    for number, name in enumerate(OPERATIONS):
        for level, sign in ((0.1, 1.0), (2.9, -1.0), (2.9, 1.0), (9.7, -1.0)):
            found = 255 * np.asarray(operate(
                jnp.asarray(image / 255, jnp.float32), np.int32(number), np.float32(level),
                np.float32(sign)))
            expected = np.asarray(by_pillow(image, name, level, sign), np.float64)
            # Pillow truncates what it stretches and rounds what it warps.
            np.testing.assert_allclose(found, expected, atol=1.01, err_msg=f"{name} {level} {sign}")
            if name in ("equalize", "posterize", "solarize"):
                np.testing.assert_allclose(found, expected, atol=1e-3)
    assert len(OPERATIONS) == augmix.NUM_OPERATIONS


def test_operations_change_the_image_and_stay_in_its_range():
    image = jnp.asarray(picture() / 255, jnp.float32)
    numbers = jnp.arange(augmix.NUM_OPERATIONS)
    found = jax.jit(jax.vmap(lambda n: augmix.operate(
        image, n, jnp.float32(3), jnp.float32(1))))(numbers)
    assert found.min() >= 0 and found.max() <= 1
    changes = jnp.max(jnp.abs(found - image[None]), axis=(1, 2, 3))
    assert changes.min() > 0.05


@pytest.fixture(name="mixed", scope="module")
def _mixed():
    """An image, and many mixtures of it with two chains of up to two operations."""
    image = jnp.asarray(picture() / 255, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 300)
    return image, np.asarray(jax.jit(jax.vmap(lambda key: augmix.augment_and_mix(
        key, image, severity=3.0, num_chains=2, depth=2)))(keys))


def test_mixtures_are_different_and_in_the_range(mixed):
    image, found = mixed
    assert found.min() >= 0 and found.max() <= 1 + 1e-6
    changes = np.max(np.abs(found - image[None]), axis=(1, 2, 3))
    assert len(np.unique(changes)) > 295 and np.median(changes) > 0.05


def test_a_mixture_of_one_chain_of_one_operation_is_between_the_image_and_the_operation():
    image = jnp.asarray(picture() / 255, jnp.float32)
    keys = jax.random.split(jax.random.key(1), 40)
    found = np.asarray(jax.jit(jax.vmap(lambda key: augmix.augment_and_mix(
        key, image, severity=0.1, num_chains=1, depth=1)))(keys))
    # At one level there are five operations that do something, and shears in two directions.
    signs = np.array([1, -1], np.float32)
    ends = np.asarray(jax.jit(jax.vmap(lambda n, sign: augmix.operate(
        image, n, jnp.float32(0.1), sign)))(
            jnp.repeat(jnp.arange(augmix.NUM_OPERATIONS), 2), jnp.tile(signs, 9)))
    directions = (ends - image[None]).reshape(18, -1)
    shares, kinds = [], set()
    for change in (found - image[None]).reshape(len(keys), -1):
        length = np.linalg.norm(change)
        if length < 1e-5:
            continue
        cosines = directions @ change / np.maximum(np.linalg.norm(directions, axis=1), 1e-9)
        best = int(np.argmax(cosines))
        np.testing.assert_allclose(cosines[best], length, rtol=1e-3)
        kinds.add(OPERATIONS[best // 2])
        shares.append(length / np.linalg.norm(directions[best]))
    assert 0 < min(shares) < 0.3 and 0.7 < max(shares) < 1
    assert len(kinds) == 5  # The others move, turn or invert nothing at that level.


def test_the_jensen_shannon_divergence_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(3, 8, 4))
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    mean = p.mean(0)
    entropy = [-np.sum(q * np.log(q), axis=-1) for q in (mean, p)]
    expected = np.mean(entropy[0] - entropy[1].mean(0))
    labels = np.zeros(8, np.int32)
    found = jax.jit(augmix.jensen_shannon_loss)(jnp.asarray(logits, jnp.float32), labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The same predictions have none, and those without a common class log 3, the most.
    sure = 200 * np.eye(4, dtype=np.float32)[None, :3].repeat(8, 0).swapaxes(0, 1)
    value, gradient = jax.jit(jax.value_and_grad(augmix.jensen_shannon_loss))(sure, labels)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(
        jax.jit(augmix.jensen_shannon_loss)(sure[:1].repeat(3, 0), labels), 0, atol=1e-6)


def test_bad_arguments_are_named():
    image, key = jnp.zeros((4, 4, 1)), jax.random.key(0)
    for changes, message in (({"severity": 0}, r"severity=0 in \[0.1, 10\]"),
                             ({"num_chains": 0}, "num_chains=0"), ({"depth": 0}, "depth=0")):
        with pytest.raises(InputError, match=message):
            augmix.augment_and_mix(key, image, **changes)
    with pytest.raises(InputError, match=r"Expected image of shape \[H, W, channels\]"):
        augmix.augment_and_mix(key, image[0])
