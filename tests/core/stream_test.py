"""Streaming: stored images, and batches read ahead in the order of the resident path."""

import functools
import gc
import importlib.util
import re
import sys
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest
import real_formats

from jaxrobust import data
from jaxrobust._validate import InputError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("grain") is None, reason="Streaming needs Grain.")

KEY = jax.random.key(3)
SIZE, BATCH = 11, 4
STEPS_PER_EPOCH = 3  # The last batch has 3 examples.
# Every pixel says which example it is of.
IMAGES = np.arange(SIZE, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 3, 2, 1), np.uint8)
LABELS = np.arange(SIZE, dtype=np.int32) % 3


class Reads:
    """What a StoredImages reads, from IMAGES, with a list of it."""

    def __init__(self, *, broken=None):
        self.positions, self.broken = [], broken

    def __call__(self, positions):
        self.positions += positions
        if self.broken in positions:
            raise OSError(f"bad checksum\nand a second line about {self.broken}")
        return [IMAGES[position] for position in positions]


def stored(read=None, size=SIZE):
    read = Reads() if read is None else read
    return data.StoredImages(read, size, IMAGES.shape[1:], "toy train")


SPLITS = {"memory": lambda: data.Split(IMAGES, LABELS),
          "stored": lambda: data.Split(stored(), LABELS)}


@functools.cache
def resident(epochs=3):
    """The batches of ``epochs`` epochs as the resident path takes them, update by update."""
    return [(IMAGES[rows], LABELS[rows]) for epoch in range(1, epochs + 1)
            for rows in pieces(data.epoch_order(KEY, epoch, SIZE))]


def pieces(order):
    """The batches of an epoch, which are consecutive pieces of its order."""
    return np.split(np.asarray(order), np.cumsum(data.batch_sizes(SIZE, BATCH))[:-1])


def stream(split, key=KEY, **arguments):
    return data.stream_batches(split, key, **{"batch_size": BATCH, **arguments})


def assert_batches_equal(actual, expected):
    for got, wanted in zip(actual, expected, strict=True):
        for array, other in zip(got, wanted, strict=True):
            assert array.dtype == other.dtype
            np.testing.assert_array_equal(array, other)


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def assert_no_reader_is_left():
    deadline = time.monotonic() + 20
    while reader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reader_threads()


@pytest.fixture(autouse=True)
def no_reader_is_left():
    """Of every test, so that the next one counts its own."""
    yield
    assert_no_reader_is_left()


# --- stored images ----------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [
    3, -1, np.int32(2), slice(None), slice(2, 9, 3), slice(4, 4), np.array([7, 0, 7, -2]),
    np.array([], np.int64), np.arange(6).reshape(2, 3), LABELS == 1,
], ids=["first", "last", "scalar", "all", "steps", "none", "positions", "empty", "table", "mask"])
def test_stored_images_are_indexed_as_an_array(rows):
    result = stored()[rows]
    assert result.dtype == np.uint8 and result.shape == IMAGES[rows].shape
    np.testing.assert_array_equal(result, IMAGES[rows])


def test_stored_images_have_the_facts_of_their_array():
    images = stored()
    assert (images.shape, images.dtype, images.ndim, len(images)) == (
        IMAGES.shape, IMAGES.dtype, IMAGES.ndim, len(IMAGES))
    assert repr(images) == "StoredImages(toy train, shape=(11, 3, 2, 1))"
    with pytest.raises(IndexError):
        images[SIZE]


def test_more_images_than_are_read_at_once_keep_their_order():
    sizes = []

    def read(positions):
        sizes.append(len(positions))
        return [np.full((1, 1, 1), position % 251, np.uint8) for position in positions]

    images = data.StoredImages(read, 1300, (1, 1, 1), "many")[::-1]
    np.testing.assert_array_equal(images.ravel(), np.arange(1300)[::-1] % 251)
    assert sizes == [512, 512, 276]


def test_taking_rows_reads_nothing_and_only_what_is_asked_for_is_read():
    read = Reads()
    view = stored(read).take(np.array([9, 2, 5])).take(slice(1, 3))
    assert view.shape == (2, 3, 2, 1) and not read.positions
    np.testing.assert_array_equal(view[:], IMAGES[[2, 5]])
    assert read.positions == [2, 5]


@pytest.mark.parametrize("convert", [np.asarray, np.array, jax.numpy.asarray],
                         ids=["asarray", "array", "jnp"])
def test_stored_images_do_not_become_an_array_by_the_way(convert):
    read = Reads()
    with pytest.raises(InputError, match=r"^Expected rows of the stored images of toy train to be "
                                         r"read, as images\[rows\], got a conversion of all 11"):
        convert(stored(read))
    assert not read.positions


def test_a_data_set_of_stored_images_is_checked_without_reading_them():
    read = Reads()
    split = data.Split(stored(read), LABELS)
    arguments = {"class_names": ("a", "b", "c"), "mean": (0.5,), "std": (0.5,), "flip": True}
    data.Dataset("toy", split, split, **arguments)
    with pytest.raises(InputError, match="Expected labels of shape"):
        data.Dataset("toy", split._replace(labels=LABELS[1:]), split, **arguments)
    assert not read.positions


def test_splitting_off_stored_images_is_as_in_memory_and_reads_nothing():
    read = Reads()
    lazy = data.split_off(data.Split(stored(read), LABELS), 4, seed=0)
    assert not read.positions
    for split, expected in zip(lazy, data.split_off(SPLITS["memory"](), 4, seed=0), strict=True):
        assert isinstance(split.images, data.StoredImages)
        np.testing.assert_array_equal(split.images[:], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)


def test_an_image_that_cannot_be_read_is_named_in_one_line():
    view = stored(Reads(broken=6)).take(slice(2, None))
    with pytest.raises(InputError) as error:
        view[1:6]
    assert str(error.value) == "Cannot read image 6 of toy train: bad checksum"


@pytest.mark.parametrize(("image", "got"), [
    (np.zeros((1, 2, 1), np.uint8), r"\(1, 2, 1\) uint8"),
    (np.zeros((3, 2, 1), np.float32), r"\(3, 2, 1\) float32"),
], ids=["shape", "dtype"])
def test_an_image_of_another_shape_or_dtype_is_named(image, got):
    images = data.StoredImages(lambda positions: [image] * len(positions), 4, (3, 2, 1), "toy")
    with pytest.raises(InputError, match=rf"^Expected image 2 of toy of shape \(3, 2, 1\) and "
                                         rf"dtype uint8, got {got}\.$"):
        images[2:]


def test_a_read_that_fails_together_is_tried_record_by_record():
    def read(positions):
        if len(positions) > 1:
            raise OSError("too much at once")
        return [IMAGES[positions[0]]]

    np.testing.assert_array_equal(stored(read)[:], IMAGES)


# --- the order and the position ---------------------------------------------------------------

@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("start", range(2 * STEPS_PER_EPOCH + 1))
def test_the_stream_is_the_resident_order_from_every_update(kind, start):
    stop = 2 * STEPS_PER_EPOCH + 2
    assert_batches_equal(stream(SPLITS[kind](), start=start, stop=stop), resident()[start:stop])


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("prefetch", [1, 7])
def test_threads_and_reading_ahead_do_not_change_the_batches(num_threads, prefetch):
    batches = stream(SPLITS["stored"](), stop=9, num_threads=num_threads, prefetch=prefetch)
    assert_batches_equal(batches, resident())


def test_one_batch_an_epoch_visits_an_order_of_its_own_each_time():
    batches = list(stream(SPLITS["stored"](), batch_size=SIZE, stop=3))
    orders = [images[:, 0, 0, 0].tolist() for images, _ in batches]
    assert orders == [data.epoch_order(KEY, epoch, SIZE).tolist() for epoch in (1, 2, 3)]
    assert len(set(map(tuple, orders))) == 3


def test_a_last_batch_of_one_is_left_out():
    split = data.Split(stored(size=10), LABELS[:10])
    batches = [images[:, 0, 0, 0].tolist() for images, _ in stream(split, batch_size=3, stop=6)]
    orders = [data.epoch_order(KEY, epoch, 10).tolist() for epoch in (1, 2)]
    assert batches == [order[first : first + 3] for order in orders for first in (0, 3, 6)]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_are_the_whole_batch(processes):
    reads = [Reads() for _ in range(processes)]

    def share_of(process):
        return lambda size: slice(size * process // processes, size * (process + 1) // processes)

    shares = [list(stream(data.Split(stored(read), LABELS), stop=5, start=1,
                          rows_of=share_of(process)))
              for process, read in enumerate(reads)]
    together = [tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                for parts in zip(*shares, strict=True)]
    assert_batches_equal(together, resident()[1:5])
    # Each reads its own share alone; one of four has none of the last batch's three examples.
    for read, share in zip(reads, shares, strict=True):
        assert sorted(read.positions) == sorted(
            int(image[0, 0, 0]) for images, _ in share for image in images)
    assert (processes == 4) == any(len(labels) == 0 for share in shares for _, labels in share)


def test_the_key_of_a_state_that_lies_on_all_devices_gives_the_same_order():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "devices")
    everywhere = jax.device_put(KEY, jax.NamedSharding(mesh, jax.P()))
    assert len(everywhere.devices()) == 8
    assert_batches_equal(stream(SPLITS["stored"](), everywhere, stop=9), resident())


def test_a_key_donated_to_a_train_step_meanwhile_does_no_harm():
    key = jax.random.clone(KEY)
    batches = stream(SPLITS["stored"](), key, stop=9)
    got = [next(batches)]
    jax.jit(lambda key: jax.random.fold_in(key, 1), donate_argnums=0)(key)
    assert key.is_deleted()
    assert_batches_equal(got + list(batches), resident())


def test_without_jaxs_cpu_backend_the_order_is_the_same():
    missing = mock.Mock(side_effect=RuntimeError("Unknown backend cpu"))
    with mock.patch.object(jax, "local_devices", missing):
        assert_batches_equal(stream(SPLITS["stored"](), stop=9), resident())
    missing.assert_called_once_with(backend="cpu")


# --- reading ahead ----------------------------------------------------------------------------

@pytest.mark.parametrize("prefetch", [1, 2])
def test_no_more_is_read_ahead_than_was_asked_for(prefetch):
    read = Reads()
    batches = stream(data.Split(stored(read), LABELS), batch_size=3, stop=100, prefetch=prefetch)
    for update in range(9):
        next(batches)
        # Of eleven examples an epoch, 3 + 3 + 3 + 2.
        ahead = sum((3, 3, 3, 2)[step % 4] for step in range(update + 1 + prefetch))
        deadline = time.monotonic() + 20
        while len(read.positions) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # For a read too many to show.
        assert len(read.positions) == ahead
    batches.close()


def test_nothing_is_read_before_the_first_batch_is_asked_for():
    read = Reads()
    batches = stream(data.Split(stored(read), LABELS), stop=9)
    time.sleep(0.05)
    assert not read.positions and not reader_threads()
    batches.close()
    assert list(stream(data.Split(stored(read), LABELS), start=4, stop=4)) == []
    assert not read.positions


@pytest.mark.parametrize("end", ["closed", "deleted", "exhausted"])
def test_no_thread_outlives_the_iterator(end):
    batches = stream(SPLITS["stored"](), stop=9)
    next(batches)
    assert reader_threads()
    if end == "closed":
        batches.close()
        assert list(batches) == []
    elif end == "exhausted":
        assert len(list(batches)) == 8
    del batches
    gc.collect()
    assert_no_reader_is_left()


def test_closing_does_not_wait_for_a_reader_that_hangs():
    blocked, release = threading.Event(), threading.Event()
    first = {int(image[0, 0, 0]) for image in resident()[0][0]}

    def read(positions):
        if not first.issuperset(positions):
            blocked.set()
            assert release.wait(60)
        return [IMAGES[position] for position in positions]

    batches = stream(data.Split(stored(read), LABELS), stop=100)
    next(batches)
    assert blocked.wait(20)
    batches.close()
    assert reader_threads()  # It hangs still: closing has not waited.
    release.set()
    assert_no_reader_is_left()


def test_a_broken_record_ends_the_stream_in_one_line_after_the_batches_before_it():
    update = next(step for step, (images, _) in enumerate(resident()) if 5 in images)
    batches = stream(data.Split(stored(Reads(broken=5)), LABELS), stop=9)
    assert_batches_equal([next(batches) for _ in range(update)], resident()[:update])
    with pytest.raises(InputError) as error:
        next(batches)
    assert str(error.value) == "Cannot read image 5 of toy train: bad checksum"
    assert_no_reader_is_left()


# --- arguments --------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "expected"), [
    ({"batch_size": 12}, r"Expected batch_size=12 in \[1, 11\]"),
    ({"batch_size": 0}, r"Expected batch_size=0 in \[1, 11\]"),
    ({"start": 6}, r"Expected start=6 in \[0, 5\]"),
    ({"start": -1}, r"Expected start=-1 in \[0, 5\]"),
    ({"num_threads": 0}, r"Expected num_threads=0 in \[1, inf\)"),
    ({"prefetch": 0}, r"Expected prefetch=0 in \[1, inf\)"),
], ids=["large batch", "no batch", "late start", "early start", "no thread", "no prefetch"])
def test_arguments_out_of_range_are_named_at_once(arguments, expected):
    with pytest.raises(InputError, match=expected):
        stream(SPLITS["stored"](), stop=5, **arguments)


def test_labels_of_another_number_are_named():
    with pytest.raises(InputError, match="Expected labels of shape"):
        stream(data.Split(stored(), LABELS[1:]), stop=5)


def test_without_grain_the_extra_to_install_is_named():
    with mock.patch.dict(sys.modules, {"grain": None}), pytest.raises(
            InputError, match=r"^Streaming needs Grain .*pip install 'jaxrobust\[data\]'$"):
        stream(SPLITS["memory"](), stop=5)


# --- what TFDS prepared -----------------------------------------------------------------------

TFDS = pytest.mark.filterwarnings("default")  # TFDS and TensorFlow have warnings of their own.
WRITERS = {"cifar10": real_formats.write_cifar10, "svhn_cropped": real_formats.write_svhn}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of both data sets, small and in their real format."""
    folder = tmp_path_factory.mktemp("tfds")
    for name, write in WRITERS.items():
        raw, *_ = write(folder / f"raw-{name}", np.random.default_rng(0))
        real_formats.prepare(name, raw, folder / "data")
    return folder / "data"


@TFDS
@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_what_stays_on_disk_is_what_is_loaded_byte_by_byte(name, prepared):
    loaded = data.load_dataset(name, prepared)
    opened = data.load_dataset(name, prepared, in_memory=False)
    assert (opened.mean, opened.std, opened.class_names) == (
        loaded.mean, loaded.std, loaded.class_names)
    for lazy, split in ((opened.train, loaded.train), (opened.test, loaded.test)):
        assert isinstance(lazy.images, data.StoredImages)
        assert isinstance(split.images, np.ndarray)
        assert lazy.images.shape == split.images.shape
        assert_batches_equal([(lazy.images[:], lazy.labels)], [split])
    batches = [data.stream_batches(split, KEY, batch_size=4, stop=9, num_threads=3)
               for split in (opened.train, loaded.train)]
    assert_batches_equal(*batches)


@TFDS
@pytest.mark.slow
def test_opening_what_stays_on_disk_decodes_no_image(prepared):
    import tensorflow_datasets as tfds

    decode = mock.Mock(side_effect=AssertionError("an image was decoded"))
    with mock.patch.object(tfds.features.Image, "decode_example_np", decode):
        opened = data.load_dataset("cifar10", prepared, in_memory=False)
        with pytest.raises(InputError, match="Cannot read image 0 of cifar10 train in .*: an image "
                                             "was decoded"):
            opened.train.images[0]


@TFDS
@pytest.mark.slow
def test_a_damaged_file_is_named_with_the_record(prepared):
    opened = data.load_dataset("cifar10", prepared, in_memory=False)
    file, = (prepared / "cifar10").rglob("*train.array_record*")
    good = file.read_bytes()
    try:
        # In place, within the second of the records of 3 kB.
        with open(file, "r+b") as damaged:
            damaged.seek(5000)
            damaged.write(bytes(16))
        with pytest.raises(InputError) as labels_error:
            data.load_dataset("cifar10", prepared, in_memory=False)
        with pytest.raises(InputError) as error:
            list(data.stream_batches(opened.train, KEY, batch_size=4, stop=4))
    finally:
        file.write_bytes(good)
    where = rf"\d+ of cifar10 train in {re.escape(str(prepared))}: Corrupted .*"
    assert re.fullmatch(f"Cannot read label {where}", str(labels_error.value))
    assert re.fullmatch(f"Cannot read image {where}", str(error.value))


def test_digits_are_in_memory_either_way():
    digits = data.load_dataset("digits", in_memory=False)
    np.testing.assert_array_equal(digits.train.images, data.load_dataset("digits").train.images)
