"""Data sets in memory or on disk, the order of an epoch, and augmentation on the device."""

from jaxrobust.data.augment import (
    Augmentation,
    make_batch,
    photo_augmentation,
    standard_augmentation,
)
from jaxrobust.data.batching import batch_sizes, epoch_order, group_batches
from jaxrobust.data.folders import (
    BadFiles,
    check_same_files,
    files_from_csv,
    files_to_csv,
    load_folder,
    read_image,
)
from jaxrobust.data.sources import (
    DATASETS,
    FOLDER_PREFIX,
    Dataset,
    File,
    Split,
    StoredImages,
    load_dataset,
    split_off,
    split_rows,
    take_rows,
)
from jaxrobust.data.stream import host_epoch_order, stream_batches

__all__ = [
    "DATASETS", "FOLDER_PREFIX", "Augmentation", "BadFiles", "Dataset", "File", "Split",
    "StoredImages", "batch_sizes", "check_same_files", "epoch_order", "files_from_csv",
    "files_to_csv", "group_batches", "host_epoch_order", "load_dataset", "load_folder",
    "make_batch", "photo_augmentation", "read_image", "split_off", "split_rows",
    "standard_augmentation", "stream_batches", "take_rows",
]
