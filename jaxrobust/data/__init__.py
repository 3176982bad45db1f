"""Data sets as arrays, augmentation on the device, and the order of an epoch."""

from jaxrobust.data.augment import Augmentation, make_batch, standard_augmentation
from jaxrobust.data.batching import batch_sizes, epoch_order, group_batches
from jaxrobust.data.sources import DATASETS, Dataset, Split, load_dataset, split_off

__all__ = [
    "DATASETS", "Augmentation", "Dataset", "Split", "batch_sizes", "epoch_order",
    "group_batches", "load_dataset", "make_batch", "split_off", "standard_augmentation",
]
