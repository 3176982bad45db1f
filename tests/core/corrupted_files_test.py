"""The official files of corrupted and perturbed images, in small ones of their formats."""

import numpy as np
import pytest
import real_formats

from jaxrobust import InputError, corruptions, data


@pytest.fixture(name="files")
def _files(tmp_path):
    """A folder in the format of CIFAR-10-C, with 4 images at each severity."""
    random = np.random.default_rng(0)
    folder = tmp_path / "raw" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    np.save(folder / "elastic_transform.npy", random.integers(0, 256, (20, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.array([3, 1, 9, 0], np.uint8), 5))
    return folder


def test_official_files_are_mapped_and_divided_by_severity(files):
    whole = np.load(files / "elastic_transform.npy")
    for severity in corruptions.SEVERITIES:
        found = data.load_corrupted(files, "elastic_transform", severity)
        assert isinstance(found.images, np.memmap)
        np.testing.assert_array_equal(found.images, whole[4 * severity - 4:4 * severity])
        assert found.labels.tolist() == [3, 1, 9, 0] and found.labels.dtype == np.int32
        assert found.origin == "official" and found.source == f"{files}/elastic_transform.npy"


def test_sequences_are_mapped(files):
    sequences = np.zeros((3, 5, 32, 32, 3), np.uint8)
    for name in ("tilt", "shot_noise_2"):
        np.save(files / f"{name}.npy", sequences)
    found = data.load_perturbed(files, "tilt")
    assert found.images.shape == sequences.shape and isinstance(found.images, np.memmap)
    assert not found.is_noise and data.load_perturbed(files, "shot_noise_2").is_noise
    with pytest.raises(InputError, match="Did you mean 'tilt'"):
        data.load_perturbed(files, "tilts")
    with pytest.raises(InputError, match="found none"):
        data.load_perturbed(files / "nowhere", "tilt")
    with pytest.raises(InputError, match=r"Expected uint8 \[m, T, H, W, 3\] in .*got uint8 \[20, "):
        data.load_perturbed(files, "elastic_transform")


def test_a_missing_or_odd_file_is_one_line(files):
    with pytest.raises(InputError) as caught:
        data.load_corrupted(files, "fog", 1)
    assert str(caught.value) == (
        f"Expected uint8 [5*N, H, W, 3] in {files}/fog.npy, found no such file.")
    good = files / "elastic_transform.npy"
    for content, message in (
            (b"no array", "Cannot read"), (b"", "Cannot read"),
            (good.read_bytes()[:5000], "Cannot read"),
            (np.zeros((20, 32, 32, 3)), r"got float64 \[20, 32, 32, 3\]"),
            (np.zeros((20, 32, 32), np.uint8), r"got uint8 \[20, 32, 32\]"),
            (np.zeros((21, 8, 8, 3), np.uint8), "got 21 images and 20 labels"),
            (np.zeros((15, 8, 8, 3), np.uint8), "got 15 images and 20 labels")):
        if isinstance(content, bytes):
            (files / "fog.npy").write_bytes(content)
        else:
            np.save(files / "fog.npy", content)
        with pytest.raises(InputError, match=message) as caught:
            data.load_corrupted(files, "fog", 1)
        assert "\n" not in str(caught.value)
    (files / "labels.npy").unlink()
    with pytest.raises(InputError, match=r"Expected integers \[5\*N\] in .*labels.npy, found no"):
        data.load_corrupted(files, "elastic_transform", 1)
    for name, severity in (("elastic", 1), ("fog", 0), ("fog", 6)):
        with pytest.raises(InputError):
            data.load_corrupted(files, name, severity)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TFDS and TensorFlow have warnings of their own.
def test_what_tfds_prepared_is_read_by_its_names(files, tmp_path):
    real_formats.prepare("cifar10_corrupted/elastic_4", files.parent, tmp_path / "data")
    found = data.load_corrupted_tfds("elastic_transform", 4, tmp_path / "data")
    expected = data.load_corrupted(files, "elastic_transform", 4)
    order, wanted = (np.lexsort(images.reshape(4, -1).T) for images in (
        found.images[:], np.asarray(expected.images)))
    np.testing.assert_array_equal(found.images[:][order], expected.images[wanted])
    np.testing.assert_array_equal(found.labels[order], expected.labels[wanted])
    assert found.origin == "official" and "cifar10_corrupted/elastic_4" in found.source
    with pytest.raises(data.NotPrepared, match=r"tfds_builder\('cifar10_corrupted/frosted_glass_b"):
        data.load_corrupted_tfds("glass_blur", 1, tmp_path / "data")
