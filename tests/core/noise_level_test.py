"""The noise of photographs: known noise on real ones, the camera's folder, and bad input."""

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from jaxrobust import InputError, noise_level
from jaxrobust.data import camera

SIZE = (64, 80)


@pytest.fixture(name="photographs", scope="module")
def _photographs():
    """Eight real photographs of 256 x 320, noiseless as far as JPEG allows: parts of two."""
    whole = [np.asarray(image) for image in sklearn.datasets.load_sample_images().images]
    return [image[top : top + 256, left : left + 320] for image in whole
            for top in (0, 170) for left in (0, 320)]


def noisy(image, level, seed):
    """An image with known noise, before any resizing, as bytes."""
    noise = level * np.random.default_rng(seed).standard_normal(image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def resized(image, size=SIZE):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("level", [5, 15.3, 40])
def test_known_noise_on_a_flat_image_is_found(level):
    flat = np.full((4, *SIZE, 3), 128, np.uint8)
    images = np.stack([noisy(image, level, seed) for seed, image in enumerate(flat)])
    np.testing.assert_allclose(255 * noise_level.noise_std(images), level, rtol=0.08)
    others = np.stack([noisy(image, level, 10 + seed) for seed, image in enumerate(flat)])
    np.testing.assert_allclose(
        255 * noise_level.pair_noise_std(images, others), level, rtol=0.05)


def test_the_error_on_small_photographs_is_what_the_docs_say(photographs):
    """Within 12 % for an image and 8 % for the median of eight; noiseless ones show 3/255."""
    small = np.stack([resized(image) for image in photographs])
    assert np.median(255 * noise_level.noise_std(small)) < 3
    for level in (10, 20, 40):
        found = 255 * noise_level.noise_std(np.stack([noisy(one, level, 1) for one in small]))
        np.testing.assert_allclose(found, level, rtol=0.12)
        assert np.median(found) == pytest.approx(level, rel=0.08)


def save(folder, images, names):
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, names, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    return camera.find_photographs(folder)


@pytest.mark.parametrize("size", [(64, 80), (128, 160), (300, 380)])
def test_noise_is_that_of_the_resized_images(size, photographs, tmp_path):
    photographs = [image // 2 + 60 for image in photographs]  # Noise that is clipped is smaller.
    images = [noisy(image, 20, seed) for seed, image in enumerate(photographs)]
    paths = save(tmp_path, images, [f"shot{number}" for number in range(len(images))])
    true = np.median([np.std(resized(one, size) / 255 - resized(clean, size) / 255)
                      for one, clean in zip(images, photographs, strict=True)])
    found = camera.measure_noise(paths, size)
    assert found.std == pytest.approx(true, rel=0.1) and found.low <= found.std <= found.high
    assert found.number == len(images) and not found.pairs
    # Without the reference, the correlation of neighbouring pixels would be taken for smoothness.
    white = np.median(noise_level.noise_std(np.stack([resized(one, size) for one in images])))
    assert white < 0.85 * true


def test_noise_that_is_clipped_in_dark_flat_areas_is_found_too_small(photographs, tmp_path):
    images = [noisy(image, 40, seed) for seed, image in enumerate(photographs)]
    paths = save(tmp_path, images, [f"shot{number}" for number in range(len(images))])
    true = np.median([np.std(resized(one) / 255 - resized(clean) / 255)
                      for one, clean in zip(images, photographs, strict=True)])
    assert 0.6 < camera.measure_noise(paths, SIZE).std / true < 0.75  # As docs/fit.md says.


def test_pairs_tell_noise_from_texture(photographs, tmp_path):
    rough = [np.random.default_rng(seed).integers(60, 190, image.shape).astype(np.uint8)
             for seed, image in enumerate(photographs[:3])]
    shots = [noisy(image, 8, seed) for seed in (1, 2) for image in rough]
    names = [f"scene{number}_{shot}" for shot in "ab" for number in range(3)]
    paths = save(tmp_path, shots, names)
    assert [len(camera.pairs_of(paths)), len(paths)] == [3, 6]
    found = camera.measure_noise(paths, rough[0].shape[:2])
    assert found.pairs and found.number == 3 and 255 * found.std == pytest.approx(8, rel=0.05)
    single = camera.measure_noise(paths, rough[0].shape[:2], use_pairs=False)
    assert not single.pairs and single.std > 3 * found.std


def test_pairs_ignore_brightness_and_what_moved(photographs, tmp_path):
    first = noisy(photographs[0] // 2 + 60, 8, 1)
    second = noisy(photographs[0] // 2 + 75, 8, 2)
    second[:120, :120] = 90
    found = noise_level.pair_noise_std(first[None], second[None])
    assert 255 * found[0] == pytest.approx(8, rel=0.06)


def test_saturated_parts_do_not_count():
    flat = noisy(np.full((1, *SIZE, 3), 128, np.uint8), 10, 0)
    whole = noise_level.noise_std(flat)[0]
    flat[:, :32] = 255
    assert noise_level.noise_std(flat)[0] == pytest.approx(whole, rel=0.1)
    assert np.isnan(noise_level.noise_std(np.full_like(flat, 255))).all()


def test_a_shot_on_its_side_has_the_size_that_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert camera.stored_size(tmp_path / "a.jpg") == (30, 20)


@pytest.mark.parametrize(("call", "problem"), [
    (lambda place: camera.find_photographs(place / "none"), "got nothing"),
    (lambda place: camera.find_photographs(place / "file.txt"), "got a file"),
    (lambda place: camera.find_photographs(place / "empty"), "found none"),
    (lambda place: camera.measure_noise([place / "broken.png"], SIZE), "Cannot read the image"),
    (lambda place: camera.measure_noise([place / "white.png"], SIZE), "saturated"),
    (lambda place: camera.measure_noise([place / "white.png"], (8, 8)), "16 x 16 pixels"),
    (lambda _: noise_level.noise_std(np.zeros((1, 8, 8, 3), np.uint8)), "16 x 16 pixels"),
    (lambda _: noise_level.noise_std(np.zeros((20, 20, 3), np.uint8)), "images of shape"),
    (lambda _: noise_level.noise_std(np.zeros((1, 20, 20, 3), np.uint8),
                                     reference=np.full((1, 16, 16, 3), 0.5)), "of shape"),
    (lambda _: noise_level.pair_noise_std(np.zeros((2, 20, 20, 3), np.uint8),
                                          np.zeros((1, 20, 20, 3), np.uint8)), "shape of first"),
])
def test_bad_input_is_one_line(call, problem, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no image")
    (tmp_path / "broken.png").write_text("no image")
    Image.fromarray(np.full((40, 40, 3), 255, np.uint8)).save(tmp_path / "white.png")
    with pytest.raises(InputError, match=problem) as error:
        call(tmp_path)
    assert str(error.value).isprintable()
