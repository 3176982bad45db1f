"""Downloads and prepares a data set through TensorFlow Datasets."""

import pathlib
import socket
import urllib.parse

from jaxrobust import _validate
from jaxrobust.data import DATASETS, tfds_builder

SOURCES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "svhn_cropped": "http://ufldl.stanford.edu/housenumbers/",
}
"""Sites from which TensorFlow Datasets downloads."""
SECONDS_TO_CONNECT = 5.0


def prepare(name: str, folder: pathlib.Path) -> str:
    """Downloads a data set and stores it as array_record, which is read without TensorFlow; returns
    a line that describes the result."""
    _validate.one_of("dataset", name, DATASETS)
    if name == "digits":
        return "digits comes with scikit-learn: there is nothing to prepare."
    builder = tfds_builder(name, folder)
    if builder.is_prepared():
        return f"{name} is already in {folder}."
    check_reachable(name, folder)
    # TFDS needs it to write images.
    _validate.installed(
        "tensorflow", "TensorFlow", f"Preparing {name}", "pip install tensorflow-cpu")
    builder.download_and_prepare()
    return f"{name} is ready in {folder}."


def check_reachable(name: str, folder: pathlib.Path) -> None:
    """Raises InputError unless the site of a data set answers within seconds.

    TensorFlow Datasets would retry for minutes.
    """
    address = urllib.parse.urlsplit(SOURCES[name])
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    try:
        socket.create_connection((address.hostname, port), SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise _validate.InputError(
            f"The data set {name} is not prepared in {folder} and cannot be downloaded: "
            f"{address.hostname} does not answer ({error}). Run `jaxrobust prepare "
            f"{name} --data-dir {folder}` where it does, or copy a prepared folder there."
        ) from error
