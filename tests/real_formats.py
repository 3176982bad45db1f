"""Small data sets in the formats that the real ones come in."""

from unittest import mock

import numpy as np
import PIL.Image

from jaxrobust import data


def _images(random, labels, size=(32, 32)):
    """Noise on a colour for each class, so that classes can be learnt."""
    colours = np.random.default_rng(0).integers(0, 128, (10, 3))
    noise = random.integers(0, 128, (len(labels), *size, 3))
    return (colours[labels][:, None, None] + noise).astype(np.uint8)


def write_cifar10(folder, random, size=3):
    """The six binary batches of the CIFAR-10 site, with ``size`` images each."""
    batches = folder / "cifar-10-batches-bin"
    batches.mkdir(parents=True)
    names = [f"data_batch_{index}.bin" for index in range(1, 6)] + ["test_batch.bin"]
    labels = (np.arange(6 * size) % 10).astype(np.uint8)
    images = _images(random, labels)
    for index, name in enumerate(names):
        part = slice(size * index, size * (index + 1))
        rows = np.concatenate(
            [labels[part, None], images[part].transpose(0, 3, 1, 2).reshape(size, -1)], axis=1)
        (batches / name).write_bytes(rows.tobytes())
    (batches / "batches.meta.txt").write_text("\n".join(
        "airplane automobile bird cat deer dog frog horse ship truck".split()) + "\n")
    train = slice(5 * size)
    test = slice(5 * size, None)
    return folder, (images[train], labels[train]), (images[test], labels[test])


def write_svhn(folder, random, train=5, test=4):
    """The MATLAB files of the SVHN site; label 10 is the digit 0."""
    import scipy.io

    folder.mkdir(parents=True)
    written = {}
    for name, size in (("train", train), ("test", test), ("extra", 1)):
        labels = (np.arange(size) % 10).astype(np.uint8)
        images = _images(random, labels)
        scipy.io.savemat(folder / f"{name}_32x32.mat", {
            "X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        written[name] = images, labels
    return folder, written["train"], written["test"]


def prepare(name, raw, data_dir):
    """Has TFDS itself prepare what lies in ``raw`` as if it had been downloaded."""
    import tensorflow_datasets as tfds

    def paths(_, urls):
        if isinstance(urls, dict):
            return {key: str(raw / url.rsplit("/", 1)[-1]) for key, url in urls.items()}
        return raw

    builder = data.tfds_builder(name, data_dir)
    manager = tfds.download.DownloadManager
    with mock.patch.object(manager, "download_and_extract", paths), mock.patch.object(
            manager, "download", paths):
        builder.download_and_prepare()


def write_folder(folder, random, size):
    """A folder of JPEG files, ``size`` of each of three classes, of mixed sizes."""
    for label, name in enumerate(("dry", "snow", "wet")):
        (folder / name).mkdir(parents=True)
        for index in range(size):
            image, = _images(random, [label], (36 + index % 7, 45))
            PIL.Image.fromarray(image).save(folder / name / f"{index}.jpg")
    return folder
