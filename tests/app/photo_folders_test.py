"""Folders as they come from cameras, archives and other people: layouts, strays, copies, names."""

import csv
import dataclasses
import io
import os
import pathlib
import shutil
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jaxrobust import InputError, data
from jaxrobust.app import network, program, trainer
from jaxrobust.app.config import RunConfig
from jaxrobust.data import copies, listing

SIZE = (24, 30)  # Height and width.


def picture(number):
    """A picture that is like no other: noise in large squares, of its own seed."""
    squares = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(squares).resize(SIZE[::-1], Image.Resampling.NEAREST)


def fill(folder, counts, first=0):
    """A folder with so many pictures of each class, each unlike all others."""
    for label, count in counts.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(first).save(folder / label / f"{number:02}.png")
            first += 1
    return folder


@pytest.fixture(name="load")
def _load(tmp_path):
    def load(path, **options):
        return data.load_folder(path, **{
            "cache_dir": tmp_path / "cache", "image_size": SIZE, "num_threads": 2} | options)
    return load


def sides_of(dataset):
    return {file.path: file.split for file in dataset.files}


def refused(load, path, **options):
    """The one line with which a folder is refused."""
    with pytest.raises(InputError) as error:
        load(path, **options)
    assert str(error.value).isprintable()
    return str(error.value)


# --- a split that is given --------------------------------------------------------------------

@pytest.mark.parametrize(("names", "validation"), [
    (("train", "test", "val"), True), (("Train", "TEST", "Validation"), True),
    (("train", "test", "valid"), True), (("train", "test"), False)])
def test_folders_of_a_split_are_its_sides(names, validation, load, tmp_path):
    counts = {"train": 6, "test": 3, "validation": 2}
    for number, name in enumerate(names):
        side = listing.SIDES[name.lower()]
        fill(tmp_path / "photos" / name, {"fog": counts[side], "rain": counts[side]}, 100 * number)
    dataset = load(tmp_path / "photos")
    assert dataset.class_names == ("fog", "rain")
    expected = {f"{name}/{label}/{number:02}.png": listing.SIDES[name.lower()]
                for name in names for label in ("fog", "rain")
                for number in range(counts[listing.SIDES[name.lower()]])}
    assert sides_of(dataset) == expected
    assert (dataset.validation is not None) == validation
    for side, split in dataset.splits.items():
        assert split.labels.tolist() == [0] * counts[side] + [1] * counts[side]
    by_path = dict(zip([file.path for file in dataset.files],
                       np.concatenate([split.images for split in dataset.splits.values()]),
                       strict=True))
    for path, image in by_path.items():
        np.testing.assert_array_equal(image, data.read_image(tmp_path / "photos" / path, SIZE))
    assert sides_of(load(tmp_path / "photos", split_seed=7)) == expected  # Nothing is drawn.
    assert any("The split is that of" in note and "12 train" in note for note in dataset.notes)
    text = data.files_to_csv(dataset.files)
    data.check_same_files(data.files_from_csv(text), dataset.files, "photos")


def test_without_a_test_folder_the_test_images_are_drawn_from_those_for_training(load, tmp_path):
    fill(tmp_path / "photos" / "train", {"fog": 10, "rain": 10})
    fill(tmp_path / "photos" / "val", {"fog": 2, "rain": 2}, 100)
    dataset = load(tmp_path / "photos")
    assert Counter((file.path.split("/")[0], file.split, file.label) for file in dataset.files) == {
        ("train", "train", "fog"): 8, ("train", "train", "rain"): 8, ("train", "test", "fog"): 2,
        ("train", "test", "rain"): 2, ("val", "validation", "fog"): 2,
        ("val", "validation", "rain"): 2}
    assert any("20% of its training images drawn for testing" in note for note in dataset.notes)


def test_a_class_may_be_called_train(load, tmp_path):
    dataset = load(fill(tmp_path / "vehicles", {"train": 5, "car": 5, "test": 5}))
    assert dataset.class_names == ("car", "test", "train") and dataset.validation is None


@pytest.mark.parametrize(("folders", "problem"), [
    (("train/fog", "train/rain", "extra/fog"), "'train', which has folders in it, beside 'extra'"),
    (("train", "val"), "no folder of a class in 'train'"),
    (("train/fog", "train/rain", "test"), "no folder of a class in 'test'"),
    (("train/fog", "train/rain"), "only train"),
    (("test/fog", "test/rain", "val/fog", "val/rain"), "only test, val"),
    (("train/fog", "train/rain", "val/fog", "valid/fog"), "one side twice in train, val, valid"),
])
def test_a_layout_that_could_be_meant_in_two_ways_is_refused(folders, problem, load, tmp_path):
    for number, folder in enumerate(folders):
        fill(tmp_path / "photos", {folder: 5}, 100 * number)
    photos = tmp_path / "photos"
    assert refused(load, photos, skip_bad=True) == (
        f"Expected folders of classes in {photos}, or 'train' beside 'test', 'val' or both with "
        f"folders of classes in each, got {problem}.")


def test_classes_without_an_image_for_training_or_testing_are_bad(load, tmp_path):
    photos = tmp_path / "photos"
    fill(photos / "train", {"fog": 4, "rain": 4, "hail": 4})
    fill(photos / "test", {"fog": 2, "rain": 2, "snow": 2}, 100)
    fill(photos / "val", {"fog": 1, "frost": 1}, 200)
    (photos / "test" / "stray.jpg").touch()
    lines = ("frost: a class without a good image", "hail: a class without a good test image",
             "snow: a class without a good training image",
             "test/stray.jpg: in no class folder")
    with pytest.raises(data.BadFiles) as error:
        load(photos)
    assert error.value.lines == lines
    dataset = load(photos, skip_bad=True)
    assert dataset.class_names == ("fog", "rain") and dataset.skipped == lines
    # A class may be absent from the validation images.
    assert Counter(file.split for file in dataset.files) == {
        "train": 8, "validation": 1, "test": 4}


def write_csv(path, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue(), newline="")
    return path


def test_a_csv_file_may_give_the_split(load, tmp_path):
    fill(tmp_path, {"a": 6, "b": 6})
    sides = ["train", "Train ", "val", "validation", "test", "valid"]
    rows = [(f"{label}/{number:02}.png", label, sides[number])
            for label in "ab" for number in range(6)]
    path = write_csv(tmp_path / "photos.csv", [("path", "label", "split"), *rows])
    dataset = load(path)
    assert sides_of(dataset) == {
        name: listing.SIDES[side.strip().lower()] for name, _, side in rows}
    # What a run records of its files is such a CSV file.
    again = tmp_path / "split.csv"
    again.write_text(data.files_to_csv(dataset.files))
    assert load(again).files == dataset.files
    bad = write_csv(tmp_path / "bad.csv", [("path", "label", "split"), *rows[:-1],
                                           (*rows[-1][:2], "holdout")])
    with pytest.raises(data.BadFiles) as error:
        load(bad)
    assert error.value.lines == ("line 13: expected train, test or val as split, got 'holdout'",)
    none = write_csv(tmp_path / "none.csv", [("path", "label", "split"), *[
        (name, label, "test") for name, label, _ in rows]])
    assert refused(load, none) == f"Expected images with the split train in {none}, got none."
    # A column without a word in it gives nothing.
    empty = write_csv(tmp_path / "empty.csv", [("path", "label", "split"), *[
        (name, label, "") for name, label, _ in rows]])
    assert Counter(sides_of(load(empty)).values()) == {"train": 10, "test": 2}


CONFIG = RunConfig(dataset="folder:photos", validation_size=4, batch_size=4)


def test_a_given_validation_split_chooses_the_epoch_and_nothing_more_is_held_out(load, tmp_path):
    for number, (side, count) in enumerate((("train", 6), ("val", 3), ("test", 2))):
        fill(tmp_path / "photos" / side, {"fog": count, "rain": count}, 100 * number)
    dataset = load(tmp_path / "photos")
    splits = trainer.make_splits(dataset, CONFIG)
    assert splits.train is dataset.train and splits.selection is dataset.validation
    assert program.num_train_of(CONFIG, dataset) == 12


# --- what is passed over ----------------------------------------------------------------------

STRAYS = (
    "fog/Thumbs.db", "fog/desktop.ini", "fog/.DS_Store", "fog/._00.png", "fog/00.xmp",
    "fog/00.AAE", "rain/00.png.json", "rain/notes.txt", "rain/deep/00.THM", "desktop.ini",
    "README.md", "labels.csv", "report.pdf")


def test_strays_are_passed_over_counted_and_stop_nothing(load, tmp_path):
    photos = fill(tmp_path / "photos", {"fog": 5, "rain": 5})
    expected = load(photos)
    assert not any("Ignored in" in note for note in expected.notes)
    for stray in STRAYS:
        (photos / stray).parent.mkdir(exist_ok=True)
        (photos / stray).write_bytes(b"no image")
    for folder in ("__MACOSX", "fog/@eaDir", "$RECYCLE.BIN", "rain/.thumbnails"):
        fill(photos / folder, {"fog": 1}, 500)
    dataset = load(photos)
    assert dataset.files == expected.files and dataset.skipped == ()
    assert [note for note in dataset.notes if "Ignored in" in note] == [
        f"Ignored in {photos}, as not part of the data set: {len(STRAYS) + 4} files and "
        "folders, the first $RECYCLE.BIN."]


def test_strays_beside_the_sides_of_a_split_are_passed_over_too(load, tmp_path):
    photos = tmp_path / "photos"
    fill(photos / "train", {"fog": 5, "rain": 5})
    fill(photos / "test", {"fog": 2, "rain": 2}, 100)
    expected = load(photos).files
    fill(photos / "__MACOSX" / "train", {"fog": 1}, 500)
    for stray in ("Thumbs.db", "train/Thumbs.db", "train/fog/desktop.ini", "data.yaml"):
        (photos / stray).touch()
    assert load(photos).files == expected


def test_a_stray_that_a_csv_file_names_is_bad(load, tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "notes.txt").write_text("no image")
    rows = [(f"{label}/{number:02}.png", label) for label in "ab" for number in range(5)]
    path = write_csv(tmp_path / "x.csv", [("path", "label"), *rows, ("a/notes.txt", "a")])
    with pytest.raises(data.BadFiles) as error:
        load(path)
    assert len(error.value.lines) == 1 and error.value.lines[0].startswith("a/notes.txt: not a ")


# --- names ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("first", "second"), [
    ("Rain", "rain"), ("Rain ", "rain"), ("light  rain", "light rain"), ("STRASSE", "Straße"),
    ("caf\u00e9", "cafe\u0301")])
def test_names_that_differ_in_case_and_spaces_alone_are_refused(first, second, load, tmp_path):
    fill(tmp_path, {"x": 10})
    rows = [(f"x/{number:02}.png", (first, second)[number % 2]) for number in range(10)]
    path = write_csv(tmp_path / "x.csv", [("path", "label"), *rows])
    if first.strip() == first:
        names = sorted((first, second))
        assert refused(load, path, skip_bad=True) == (
            f"Expected class names in {path} that differ in more than case and spaces, got "
            f"{names[0]!r} and {names[1]!r}. Give one class one name.")
    photos = fill(tmp_path / "photos", {first: 5, second: 5})
    line = refused(load, photos)
    assert repr(first) in line and repr(second) in line


def test_such_names_are_refused_across_the_sides_of_a_split(load, tmp_path):
    fill(tmp_path / "photos" / "train", {"Rain": 5, "fog": 5})
    fill(tmp_path / "photos" / "test", {"rain": 5, "fog": 5}, 100)
    assert "got 'Rain' and 'rain'" in refused(load, tmp_path / "photos")


def test_numbers_in_names_are_in_their_own_order(load, tmp_path):
    numbers = ["0", "1", "2", "9", "10", "11", "100"]
    dataset = load(fill(tmp_path / "photos", dict.fromkeys(reversed(numbers), 5)))
    assert dataset.class_names == tuple(numbers)
    for split in dataset.splits.values():
        labels = dict(zip([file.path for file in dataset.files if file.split == (
            "train" if split is dataset.train else "test")], split.labels, strict=True))
        assert all(numbers[label] == path.split("/")[0] for path, label in labels.items())
    assert listing.class_order(["b10", "a", "b9", "B", "b"]) == ["B", "a", "b", "b9", "b10"]
    assert listing.class_order(["1", "01", "1a", "a1"]) == ["01", "1", "1a", "a1"]


@pytest.mark.parametrize(("names", "difference"), [
    (("10", "9"), "another order, with '10' instead of '9' as class 0"),
    (("9", "10", "11"), "3 instead of 2, new '11'"), (("9",), "1 instead of 2, without '10'"),
    (("9", "ten"), "2 instead of 2, new 'ten' and without '10'")])
def test_a_difference_of_classes_is_spelt_out(names, difference):
    assert network._difference(("9", "10"), names) == difference


def test_a_run_trained_with_classes_in_another_order_is_refused(load, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    dataset = load(fill(tmp_path / "photos", {"9": 5, "10": 5}))
    network.check_network(dataset, run)  # It has not begun.
    network.save_network(dataset, run)
    network.check_network(dataset, run)
    with pytest.raises(InputError) as error:
        network.check_network(dataclasses.replace(dataset, class_names=("10", "9")), run)
    assert str(error.value) == (
        f"Expected the classes of {dataset.name} that {run} was trained with, got another order, "
        "with '10' instead of '9' as class 0.")


# --- the split --------------------------------------------------------------------------------

def test_the_order_of_the_file_system_changes_nothing(load, tmp_path):
    photos = fill(tmp_path / "photos", {"fog": 9, "rain": 8})
    shutil.copy(photos / "fog" / "03.png", photos / "fog" / "99.png")
    expected = load(photos)
    walk, iterdir = os.walk, pathlib.Path.iterdir

    def backwards(*arguments, **options):
        for root, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield root, folders, files[::-1]

    with mock.patch.object(os, "walk", backwards), mock.patch.object(
            pathlib.Path, "iterdir", lambda path: list(iterdir(path))[::-1]):
        dataset = load(photos, cache_dir=tmp_path / "other")
    assert dataset.files == expected.files and dataset.notes == expected.notes
    np.testing.assert_array_equal(dataset.train.images, expected.train.images)


def test_copies_are_on_one_side_of_a_drawn_split_and_of_the_validation_images(load, tmp_path):
    photos = fill(tmp_path / "photos", {"fog": 20, "rain": 20})
    alone = load(photos)
    for number in range(12):  # Of most pictures of fog: the same bytes, or the same pixels.
        source = photos / "fog" / f"{number:02}.png"
        if number % 2:
            shutil.copy(source, photos / "fog" / f"copy {number}.png")
        else:
            with Image.open(source) as image:
                image.save(photos / "fog" / f"copy {number}.bmp")
    original = {f"fog/copy {number}.{('bmp', 'png')[number % 2]}": f"fog/{number:02}.png"
                for number in range(12)}
    for seed in range(4):
        dataset = load(photos, split_seed=seed, image_size=SIZE)
        sides = sides_of(dataset)
        assert all(sides[copy] == sides[path] for copy, path in original.items())
        assert {"train", "test"} == {sides[copy] for copy in original} or seed
        paths = [file.path for file in dataset.files if file.split == "train"]
        rows, held_out = program.rows_of(CONFIG, dataset)
        held = {paths[row] for row in held_out}
        assert sorted([*rows, *held_out]) == list(range(len(paths))) and 2 <= len(held) <= 8
        assert all((copy in held) == (path in held) for copy, path in original.items()
                   if sides[copy] == "train")
        splits = trainer.make_splits(dataset, CONFIG)
        assert len(splits.train.labels) == program.num_train_of(CONFIG, dataset) == len(rows)
        note, = (note for note in dataset.notes if "Copies" in note)
        assert note.startswith("Copies of other images: 12, the first fog/00.png (")
        assert note.endswith("; none is on another side of the split.")
    # Without them the split is the one that it is without groups.
    train, test = data.split_rows(np.repeat(np.arange(2), 20), 8, seed=0)
    paths = [f"{label}/{number:02}.png" for label in ("fog", "rain") for number in range(20)]
    assert sides_of(alone) == {
        **{paths[row]: "train" for row in train}, **{paths[row]: "test" for row in test}}
    assert not any("Copies" in note for note in alone.notes)


def test_a_class_of_copies_cannot_be_divided_and_says_so(load, tmp_path):
    photos = fill(tmp_path / "photos", {"fog": 1, "rain": 9})
    for number in range(8):
        shutil.copy(photos / "fog" / "00.png", photos / "fog" / f"copy{number}.png")
    assert refused(load, photos) == (
        f"Expected at least 5 images of every class in {photos} for both sides of the split with "
        "test_share=0.2, got 1 of 'fog', not counting 8 copies.")


def test_groups_stay_together_and_the_share_is_counted_without_copies():
    labels = np.repeat(np.arange(2), [30, 20])
    groups = np.where(np.arange(50) < 10, 0, np.arange(50))  # Ten examples are one image.
    taken = [data.split_rows(labels, 10, seed=seed, groups=groups)[1] for seed in range(20)]
    # A fifth of 41 images is 8; the ten come along as one of them, or not at all.
    assert {len(rows) for rows in taken} == {8, 17}
    assert all(np.isin(np.arange(10), rows).mean() in (0, 1) for rows in taken)
    with pytest.raises(InputError, match="Expected size=2 to leave every class of 4 examples on"):
        data.split_rows(np.zeros(4, int), 2, seed=0, groups=np.zeros(4, int))


def test_copies_on_two_sides_of_a_given_split_are_one_line(load, tmp_path):
    photos = tmp_path / "photos"
    fill(photos / "train", {"fog": 5, "rain": 5})
    fill(photos / "test", {"fog": 3, "rain": 3}, 100)
    shutil.copy(photos / "train" / "rain" / "02.png", photos / "test" / "rain" / "copy.png")
    shutil.copy(photos / "train" / "rain" / "02.png", photos / "train" / "rain" / "copy.png")
    dataset = load(photos)
    assert [note for note in dataset.notes if "Copies" in note] == [
        "Copies of other images: 2. Images that are on two sides of the split: 1, the first "
        "test/rain/copy.png (test) and train/rain/02.png (train). Results on these say nothing "
        "about new images."]


def test_one_photograph_in_two_classes_is_bad_in_both(load, tmp_path):
    photos = fill(tmp_path / "photos", {"fog": 6, "rain": 6})
    shutil.copy(photos / "fog" / "02.png", photos / "rain" / "x.png")
    lines = ("fog/02.png: the same image as rain/x.png, which is of another class",
             "rain/x.png: the same image as fog/02.png, which is of another class")
    with pytest.raises(data.BadFiles) as error:
        load(photos)
    assert error.value.lines == lines and lines[0] in str(error.value)
    dataset = load(photos, skip_bad=True)
    assert dataset.skipped == lines and len(dataset.files) == 11
    assert not {"fog/02.png", "rain/x.png"} & set(sides_of(dataset))


def test_near_copies_are_reported_and_pictures_alike_are_not(load, tmp_path):
    photos = fill(tmp_path / "photos", {"fog": 20, "rain": 20})
    assert not any("nearly" in note for note in load(photos).notes)
    with Image.open(photos / "fog" / "03.png") as image:  # Smaller, and of a low quality.
        image.resize((28, 22), Image.Resampling.BILINEAR).save(
            photos / "fog" / "small.jpg", quality=70)
    note, = (note for note in load(photos).notes if "nearly" in note)
    assert note.startswith("Pairs of images that are nearly the same: 1, on two sides of the ")
    assert "fog/03.png (" in note and "fog/small.jpg (" in note
    with mock.patch.object(copies, "MOST_COMPARED", 0):
        assert ("Images that are nearly the same are not searched for: more than 0 pairs of images "
                "would have to be compared.") in load(photos).notes
        assert refused(load, photos, join_near_copies=True) == (
            f"Expected join_near_copies=False for {photos}, in which more than 0 pairs of images "
            "would have to be compared.")


def altered(image, name):
    """The picture after what people do to one before they upload it again."""
    if name == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
        return Image.open(file)
    return {"smaller": lambda: image.resize((98, 78), Image.Resampling.BILINEAR),
            "mirrored": lambda: ImageOps.mirror(image),
            "brighter": lambda: ImageEnhance.Brightness(image).enhance(1.05)}[name]()


def scene(number):
    """A picture of 80 x 100 with large forms and small ones, as photographs have."""
    random = np.random.default_rng(number)
    spectrum = np.fft.rfft2(random.normal(size=(80, 100)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(80), np.fft.rfftfreq(100), indexing="ij"))
    grey = np.fft.irfft2(spectrum / np.maximum(frequency, 0.01), (80, 100))
    grey = np.clip(128 + 45 * (grey - grey.mean()) / grey.std(), 0, 255)
    return Image.fromarray(np.stack([grey, grey * 0.8, 255 - grey], -1).astype(np.uint8))


@pytest.mark.parametrize("name", ["jpeg", "smaller", "mirrored", "brighter"])
def test_altered_copies_are_reported_and_drawn_together_if_asked(name, load, tmp_path):
    photos = tmp_path / "photos"
    for label, first in (("fog", 0), ("rain", 20)):
        (photos / label).mkdir(parents=True)
        for number in range(first, first + 20):
            scene(number).save(photos / label / f"{number:02}.png")
    for number in range(10):
        altered(scene(number), name).save(photos / "fog" / f"again {number}.bmp")
    dataset = load(photos)
    note, = (note for note in dataset.notes if "nearly" in note)
    sides = sides_of(dataset)
    apart = [number for number in range(10)
             if sides[f"fog/again {number}.bmp"] != sides[f"fog/{number:02}.png"]]
    assert apart  # Or the rest would show nothing.
    assert note.startswith("Pairs of images that are nearly the same: 10, on two sides of the "
                           f"split: {len(apart)}, the first fog/{apart[0]:02}.png (")
    assert note.endswith("). join_near_copies draws them together.")
    for seed in range(3):
        together = load(photos, join_near_copies=True, split_seed=seed)
        sides = sides_of(together)
        assert set(sides.values()) == {"train", "test"}
        assert all(sides[f"fog/again {number}.bmp"] == sides[f"fog/{number:02}.png"]
                   for number in range(10))
        note, = (note for note in together.notes if "nearly" in note)
        assert "on two sides of the split: 0, the first" in note
    config = dataclasses.replace(CONFIG, validation_size=8)  # Drawn from the groups as well.
    paths = [file.path for file in together.files if file.split == "train"]
    held = {paths[row] for row in program.rows_of(config, together)[1]}
    assert all((f"fog/again {number}.bmp" in held) == (f"fog/{number:02}.png" in held)
               for number in range(10) if sides[f"fog/{number:02}.png"] == "train")


def test_groups_with_a_pair_in_common_are_one():
    groups = np.array([0, 1, 2, 0, 3, 4], np.int32)
    pairs = np.array([[1, 3], [2, 5]])
    assert copies.joined(groups, pairs).tolist() == [0, 0, 1, 0, 2, 1]
    assert copies.joined(groups, np.empty((0, 2), np.int64)).tolist() == groups.tolist()
    assert copies.joined(np.empty(0, np.int32), np.empty((0, 2), np.int64)).tolist() == []


def test_near_copies_are_those_of_all_pairs_compared():
    random = np.random.default_rng(0)
    thumbnails = np.stack([np.asarray(scene(number).convert("L").resize((16, 16)))
                           for number in range(60)]).astype(int)
    noisy = np.clip(thumbnails + random.normal(0, [[[5]]] * 60, thumbnails.shape), 0, 255)
    every = np.concatenate([thumbnails, noisy[:, :, ::-1], noisy]).astype(np.uint8)
    found = copies.near_copies([one.tobytes() for one in every])
    expected = []
    for other in range(180):
        for one in range(other):
            likeness = max(np.corrcoef(every[one].ravel(), flipped.ravel())[0, 1]
                           for flipped in (every[other], every[other][:, ::-1]))
            assert abs(likeness - copies.ALIKE) > 1e-6
            if likeness > copies.ALIKE:
                expected.append([one, other])
    assert 50 < len(expected) < 180 * 179 / 2
    assert found.tolist() == sorted(expected)


def test_thumbnails_correlate_as_numpy_says_and_flat_ones_with_none():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 48, 3), np.uint8)
    images[3] = np.clip(images[1] * 0.7 + 20, 0, 255)  # Darker, and of less contrast.
    images[4] = images[5] = 77
    thumbnails = [copies.thumbnail_of(image) for image in images]
    assert {len(thumbnail) for thumbnail in thumbnails} == {256}
    np.testing.assert_array_equal(copies.near_copies(thumbnails), [[1, 3]])
    grey = images[0] @ np.array([0.299, 0.587, 0.114])
    for axis, factor in enumerate((2, 3)):  # Triangles, as wide as two pixels of the thumbnail.
        distance = (np.arange(16 * factor) + 0.5) / factor - np.arange(16)[:, None] - 0.5
        weights = np.maximum(1 - np.abs(distance), 0)
        weights /= weights.sum(1, keepdims=True)
        grey = np.moveaxis(np.tensordot(weights, grey, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(
        np.frombuffer(thumbnails[0], np.uint8).reshape(16, 16), grey, atol=1.5)
    assert copies.near_copies([]).shape == (0, 2)
    many = [bytes(row) for row in rng.integers(0, 256, (2500, 256), np.uint8)]
    for row in (1700, 2400):
        many[row] = many[3]
    assert copies.near_copies(many).tolist() == [[3, 1700], [3, 2400], [1700, 2400]]


# --- classes ----------------------------------------------------------------------------------

def test_classes_of_very_different_sizes_are_one_line_with_the_share_of_the_largest(
        load, tmp_path):
    photos = fill(tmp_path / "photos", {"fog": 45, "rain": 5})
    note, = load(photos).notes
    # Four fifths of each are for training.
    assert note.startswith("Classes are of very different sizes: 36 training images of 'fog', 4 of "
                           "'rain'. Predicting 'fog' for every image is right for 90.0% of them")
    assert not load(fill(tmp_path / "even", {"fog": 14, "rain": 5}, 500)).notes
