"""Data sets in memory or on disk, the order of an epoch, and augmentation on the device."""

from jaxrobust.data.augment import Augmentation, make_batch, standard_augmentation
from jaxrobust.data.batching import epoch_indices, epoch_order
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
    "DATASETS", "Augmentation", "Dataset", "Split", "StoredImages", "epoch_indices",
    "epoch_order", "load_dataset", "make_batch", "split_off", "standard_augmentation",
    "stream_batches",
]
