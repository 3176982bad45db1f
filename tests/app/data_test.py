"""Data sets: digits, and CIFAR-10 and SVHN prepared by TFDS from small files in their format."""

import dataclasses
import functools
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import real_formats
from command_line import call, one_line

from experiments.__main__ import COMMANDS
from jaxrobust import data, perturbations
from jaxrobust._validate import InputError
from jaxrobust.app import cli


def test_digits_are_the_1797_real_ones_divided_by_class():
    dataset = data.load_dataset("digits")
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (1437, 360)
    assert dataset.train.images.shape[1:] == (8, 8, 1)
    assert dataset.train.images.max() == 255
    shares = [np.bincount(split.labels) / len(split.labels)
              for split in (dataset.train, dataset.test)]
    np.testing.assert_allclose(*shares, atol=0.005)
    pixels = dataset.train.images / 255
    np.testing.assert_allclose((dataset.mean[0], dataset.std[0]), (pixels.mean(), pixels.std()))
    assert not dataset.flip


def test_splitting_off_divides_without_loss_and_by_seed():
    split = data.load_dataset("digits").train
    rest, share = data.split_off(split, 237, seed=0)
    assert (len(rest.labels), len(share.labels)) == (1200, 237)
    together = np.concatenate([rest.images, share.images]).reshape(1437, -1)
    np.testing.assert_array_equal(
        np.sort(together.sum(1)), np.sort(split.images.reshape(1437, -1).sum(1)))
    again = data.split_off(split, 237, seed=0)[1]
    other = data.split_off(split, 237, seed=1)[1]
    np.testing.assert_array_equal(share.images, again.images)
    assert not np.array_equal(share.images, other.images)


@pytest.mark.parametrize("size", [0, 1437])
def test_a_share_out_of_range_is_named(size):
    split = data.load_dataset("digits").train
    with pytest.raises(InputError, match=f"Expected size={size}"):
        data.split_off(split, size, seed=0)


def test_a_share_too_small_for_the_classes_is_named():
    split = data.load_dataset("digits").train
    with pytest.raises(InputError, match="Expected size=5 to leave every class"):
        data.split_off(split, 5, seed=0)


def test_labels_outside_the_classes_are_named():
    good = data.Split(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1], np.int32))
    bad = good._replace(labels=np.array([0, 3], np.int32))
    with pytest.raises(InputError, match=r"Expected train labels in \[0, 3\), got 3 at index 1"):
        data.Dataset("toy", bad, good, ("a", "b", "c"), (0.5,), (0.5,), flip=True)


def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        data.load_dataset("cifar-10")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TFDS and TensorFlow have warnings of their own.
@pytest.mark.parametrize("name, write", [
    ("cifar10", real_formats.write_cifar10), ("svhn_cropped", real_formats.write_svhn)])
def test_what_tfds_prepared_is_read_back_to_the_bit(name, write, tmp_path):
    raw, *expected = write(tmp_path / "raw", np.random.default_rng(0))
    real_formats.prepare(name, raw, tmp_path / "data")
    dataset = data.load_dataset(name, tmp_path / "data")
    for split, (images, labels) in zip((dataset.train, dataset.test), expected, strict=True):
        # TFDS shuffles what it writes.
        order = np.lexsort(split.images.reshape(len(split.labels), -1).T)
        wanted = np.lexsort(images.reshape(len(labels), -1).T)
        np.testing.assert_array_equal(split.images[order], images[wanted])
        np.testing.assert_array_equal(split.labels[order], labels[wanted])
    assert len(dataset.class_names) == 10 and dataset.flip


@pytest.mark.filterwarnings("default")
def test_a_data_set_that_is_not_prepared_names_the_folder_and_what_prepares_it(tmp_path):
    with pytest.raises(InputError) as error:
        data.load_dataset("cifar10", tmp_path)
    assert str(error.value) == (
        f"The data set cifar10 is not prepared in {tmp_path}. Prepare it with: "
        f"jaxrobust.data.tfds_builder('cifar10', {str(tmp_path)!r}).download_and_prepare()")


@pytest.mark.filterwarnings("default")
def test_the_folder_is_that_of_tfds_own_variable_for_the_library_and_every_command(
        tmp_path, monkeypatch, capsys):
    found = [field.default_factory for command in COMMANDS.values()
             for field in dataclasses.fields(cli.find(command)) if field.name == "data_dir"]
    assert len(found) >= 8
    for value, folder in ((str(tmp_path), str(tmp_path)), ("", "~/tensorflow_datasets")):
        monkeypatch.setenv("TFDS_DATA_DIR", value)
        assert {make() for make in found} == {pathlib.Path(folder)}
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    with pytest.raises(InputError, match=f"is not prepared in {tmp_path}/mine"):
        data.load_dataset("cifar10")
    assert call("train", "cifar10/normal", "--out", tmp_path / "run") == 2
    assert one_line(capsys) == (
        f"error: The data set cifar10 is not prepared in {tmp_path}/mine. Prepare it with: "
        f"jaxrobust prepare cifar10 --data-dir {tmp_path}/mine")
    with pytest.raises(InputError, match=f"is not prepared in {tmp_path}/other"):
        data.load_dataset("cifar10", tmp_path / "other")


def test_without_tfds_the_extra_to_install_is_named(tmp_path):
    with mock.patch.dict(sys.modules, {"tensorflow_datasets": None}), pytest.raises(
            InputError, match=r"pip install 'jaxrobust\[data\]'"):
        data.load_dataset("svhn_cropped", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("independent_views", [False, True])
def test_shares_of_a_batch_with_their_positions_are_the_whole_batch_to_the_bit(independent_views):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (6, 5, 4, 2), np.uint8), np.arange(6, dtype=np.int32)
    key = jax.random.key(0)
    make = jax.jit(functools.partial(
        data.make_batch, augment=data.standard_augmentation(padding=2),
        perturb=perturbations.gaussian(0.2), independent_views=independent_views))
    whole = make(key, images, labels)
    halves = [make(key, images[rows], labels[rows], positions=np.arange(6, dtype=np.int32)[rows])
              for rows in (slice(3), slice(3, 6))]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    jax.tree.map(np.testing.assert_array_equal, joined, jax.device_get(whole))
    # Without them the second half would get the randomness of the first.
    alone = make(key, images[3:], labels[3:])
    assert not np.array_equal(alone.clean, whole.clean[3:])


def test_positions_of_another_number_are_named():
    with pytest.raises(InputError, match=r"Expected positions of shape \[B\] with B=2"):
        data.make_batch(
            jax.random.key(0), np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32),
            augment=data.standard_augmentation(), perturb=perturbations.identity(),
            positions=np.arange(3))
