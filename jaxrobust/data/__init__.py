"""Data sets in memory or on disk, the order of an epoch, and augmentation on the device."""

from jaxrobust.data.augment import (
    Augmentation,
    make_batch,
    photo_augmentation,
    standard_augmentation,
)
from jaxrobust.data.batching import batch_sizes, epoch_order, group_batches
from jaxrobust.data.corrupted import (
    Corrupted,
    Perturbed,
    load_corrupted,
    load_corrupted_tfds,
    load_perturbed,
)
from jaxrobust.data.decoded import read_image
from jaxrobust.data.folders import FOLDER_PREFIX, BadFiles, load_folder
from jaxrobust.data.sources import (
    DATASETS,
    NotPrepared,
    default_data_dir,
    load_dataset,
    tfds_builder,
)
from jaxrobust.data.splitting import split_off, split_rows, take_rows
from jaxrobust.data.stream import host_epoch_order, stream_batches
from jaxrobust.data.types import (
    Dataset,
    File,
    Split,
    StoredImages,
    check_same_files,
    files_from_csv,
    files_to_csv,
)

__all__ = [
    "DATASETS", "FOLDER_PREFIX", "Augmentation", "BadFiles", "Corrupted", "Dataset", "File",
    "NotPrepared", "Perturbed", "Split", "StoredImages", "batch_sizes", "check_same_files",
    "default_data_dir", "epoch_order", "files_from_csv", "files_to_csv", "group_batches",
    "host_epoch_order", "load_corrupted", "load_corrupted_tfds", "load_dataset", "load_folder",
    "load_perturbed", "make_batch", "photo_augmentation", "read_image", "split_off", "split_rows",
    "standard_augmentation", "stream_batches", "take_rows", "tfds_builder",
]
