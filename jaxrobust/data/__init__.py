"""Data sets in memory or on disk, the order of an epoch, and augmentation on the device."""

from jaxrobust.data.augment import (
    Augmentation,
    make_batch,
    photo_augmentation,
    standard_augmentation,
)
from jaxrobust.data.batching import batch_sizes, epoch_order, group_batches
from jaxrobust.data.sources import (
    DATASETS,
    Dataset,
    Split,
    StoredImages,
    load_dataset,
    split_off,
)
from jaxrobust.data.stream import stream_batches

__all__ = [
    "DATASETS", "Augmentation", "Dataset", "Split", "StoredImages", "batch_sizes",
    "epoch_order", "group_batches", "load_dataset", "make_batch", "photo_augmentation",
    "split_off", "standard_augmentation", "stream_batches",
]
