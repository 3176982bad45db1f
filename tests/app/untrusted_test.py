"""Files of other people: nothing in them is run, no path leads out, no size is believed."""

import io
import json
import pathlib
import pickle
import shutil
import zipfile
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrobust import data
from jaxrobust._validate import InputError
from jaxrobust.app import classifiers, files, network, run_folder
from jaxrobust.data import decoded
from jaxrobust.models import pytorch


class Trap:
    """A Python object that, unpickled, leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def refused(read, *arguments):
    """The one line with which something is refused."""
    with pytest.raises(InputError) as error:
        read(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.fixture(name="trap")
def _trap(tmp_path):
    trap = tmp_path / "sprung"
    yield trap
    assert not trap.exists()


# --- no code ----------------------------------------------------------------------------------

def test_no_python_object_is_made_of_arrays(trap, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, good=np.arange(3), bad=np.array([Trap(trap)], object))
    assert refused(files.read_arrays, path) == (
        f"Cannot read {path}: bad.npy is no array of object [1].")
    np.save(tmp_path / "gaussian_noise.npy", np.array([Trap(trap)], object))
    np.save(tmp_path / "labels.npy", np.zeros(50000, np.uint8))
    assert "Cannot read" in refused(data.load_corrupted, tmp_path, "gaussian_noise", 1)


def test_no_python_object_is_made_of_weights(trap, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch reads its own format.")
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(3), "trap": Trap(trap)}, path)
    assert "contains other Python objects" in refused(pytorch.read_state_dict, path)
    path.write_bytes(pickle.dumps(Trap(trap)))
    assert "contains other Python objects" in refused(pytorch.read_state_dict, path)


def exported(function, shape=(2, 3)):
    return jax.export.export(
        jax.jit(function), disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("trap")])(
            jax.ShapeDtypeStruct(shape, jnp.float32))


def test_an_artefact_that_calls_python_or_a_library_is_refused(tmp_path):
    path = tmp_path / "a.stablehlo"
    path.write_bytes(exported(lambda x: jax.ffi.ffi_call(
        "trap", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)).serialize())
    assert refused(classifiers.image_shape_of, path) == (
        f"Expected {path} to call no code outside of it, got calls of trap.")

    @jax.custom_vjp
    def hidden(x):
        return x

    hidden.defvjp(lambda x: (x, x), lambda x, cotangent: (jax.ffi.ffi_call(
        "trap", jax.ShapeDtypeStruct(x.shape, x.dtype))(cotangent),))
    path.write_bytes(exported(hidden).serialize(vjp_order=1))  # In the derivative alone.
    assert "got calls of trap" in refused(classifiers.image_shape_of, path)
    path.write_bytes(exported(lambda x: jnp.tanh(x) @ x.T).serialize(vjp_order=1))
    assert classifiers.image_shape_of(path) == (3,)


def test_an_artefact_of_other_bytes_is_one_line(tmp_path):
    path = tmp_path / "a.stablehlo"
    whole = exported(jnp.tanh).serialize()
    for content in (b"", b"no artefact", whole[:50], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "Cannot read" in refused(classifiers.image_shape_of, path)


# --- sizes ------------------------------------------------------------------------------------

def npz_with_header(path, shape, dtype="<f8", content=b"", method=zipfile.ZIP_STORED):
    """An .npz file with an array of another size than its header says."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", file.getvalue() + content)
    return path


@pytest.mark.parametrize(("shape", "content", "method", "reason"), [
    ((2**50,), b"", zipfile.ZIP_STORED, "a.npy is no array of float64 [1125899906842624]"),
    ((-1,), b"", zipfile.ZIP_STORED, "a.npy is no array of float64 [-1]"),
    ((2**20,), bytes(2**23), zipfile.ZIP_DEFLATED, "its arrays are larger than the file"),
])
def test_an_array_larger_than_its_file_is_refused_before_it_is_made(
        shape, content, method, reason, tmp_path):
    path = npz_with_header(tmp_path / "a.npz", shape, content=content, method=method)
    with mock.patch.object(np.lib.format, "read_array", side_effect=AssertionError("read")):
        assert refused(files.read_arrays, path) == f"Cannot read {path}: {reason}."


def test_a_json_file_that_is_too_large_or_too_deep_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    assert "Cannot read" in refused(files.read_json, path)
    path.write_text("[1]")
    assert refused(files.read_json, path) == f"Expected an object in {path}, found a list."
    path.write_text("{}")
    with mock.patch.object(files, "MOST_BYTES_OF_JSON", 1):
        assert refused(files.read_json, path) == f"Expected {path} of at most 1 bytes, got 2."


def test_weights_that_would_grow_in_memory_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch reads its own format.")
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(1).expand(10**6)}, path)  # One number in the file.
    assert "'weight' is larger than the file" in refused(pytorch.read_state_dict, path)
    torch.save({"weight": torch.zeros(10**5)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert refused(pytorch.read_state_dict, path) == (
        f"Cannot read the weights in {path}: its tensors are larger than the file.")


def test_a_networks_images_are_not_of_any_size(tmp_path):
    facts = {"image_shape": [2**20, 2**20, 3], "class_names": ["a", "b"], "mean": [0.5] * 3,
             "std": [0.5] * 3}
    files.write_json(tmp_path / "network.json", facts)
    assert "as a height and a width in [1, 16384]" in refused(network.read_network, tmp_path)


# --- paths ------------------------------------------------------------------------------------

SIZE = (4, 4)


def fill(folder, first=0):
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(5):
            Image.new("L", SIZE, first).save(folder / label / f"{number}.png")
            first += 1
    return folder


def load(path, tmp_path, **options):
    return data.load_folder(path, cache_dir=tmp_path / "cache", image_size=SIZE, **options)


def test_no_link_and_no_path_in_a_csv_file_leads_out_of_the_folder(tmp_path):
    secret = fill(tmp_path / "secret", 100)
    photos = fill(tmp_path / "photos")
    (photos / "a" / "link.png").symlink_to(secret / "a" / "0.png")
    (photos / "b" / "deep").symlink_to(fill(tmp_path / "others", 50) / "b")
    (photos / "b" / "everything").symlink_to("/")  # Which to walk would take for ever.
    (photos / "c").symlink_to(secret / "b")
    (photos / "a" / "inside.png").symlink_to("0.png")  # As it should be.
    lines = ("a/link.png: leads out of the folder", "b/deep: leads out of the folder",
             "b/everything: leads out of the folder", "c: a class without a file",
             "c: leads out of the folder")
    with pytest.raises(data.BadFiles) as error:
        load(photos, tmp_path)
    assert error.value.lines == lines
    found = load(photos, tmp_path, skip_bad=True)
    assert found.skipped == lines and len(found.files) == 11
    (photos / "b" / "everything").unlink()
    assert len(load(photos, tmp_path, outside_links=True).files) == 11 + 1 + 5 + 5


def test_a_csv_file_names_no_file_elsewhere(tmp_path):
    secret = fill(tmp_path / "secret", 100)
    photos = fill(tmp_path / "photos")
    rows = [f"{label}/{number}.png,{label}" for label in "ab" for number in range(5)]
    table = photos / "all.csv"
    table.write_text("\n".join(["path,label", *rows, "../secret/a/0.png,a",
                                f"{secret}/a/1.png,a", "a/../b/0.png,b"]))
    with pytest.raises(data.BadFiles) as error:
        load(table, tmp_path)
    assert error.value.lines == ("../secret/a/0.png: leads out of the folder",
                                 f"{secret}/a/1.png: leads out of the folder")


def test_a_study_names_no_run_elsewhere(tmp_path):
    for row in ("../run", "/etc/run", "a\\b"):
        assert refused(run_folder.place_of, tmp_path, row, 0) == (
            f"Expected the name of a row in {tmp_path} without slashes, got {row!r}.")


def test_an_archive_of_arrays_is_not_unpacked(tmp_path):
    path = tmp_path / "folder" / "a.npz"
    path.parent.mkdir()
    content = io.BytesIO()
    np.save(content, np.arange(3))
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../b.npy", "/c.npy"):
            archive.writestr(name, content.getvalue())
    assert len(files.read_arrays(path)) == 2
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def test_a_cache_names_and_removes_no_file_but_its_own(tmp_path):
    photos, victim = fill(tmp_path / "photos"), tmp_path / "victim.npy"
    before = load(photos, tmp_path)
    index, = (tmp_path / "cache").glob("*.json")
    record = json.loads(index.read_text())
    shutil.copy(index.parent / record["images"], victim)
    np.save(victim, 255 - np.load(victim))
    for name in (str(victim), "../victim.npy", 5):
        index.write_text(json.dumps(record | {"images": name}))
        np.testing.assert_array_equal(load(photos, tmp_path).train.images, before.train.images)
        assert victim.exists()
    assert not decoded._is_own(index, ".")


# --- damaged files of a run -------------------------------------------------------------------

def test_a_value_of_another_type_in_a_configuration_is_named(tmp_path):
    for name, value, kind in (
            ("epochs", "3", "int"), ("epochs", True, "int"), ("dataset", 5, "str"),
            ("init_from", [1], "str | None"), ("image_size", [1], "tuple[int, int]"),
            ("optimizer", 3, None), ("robust", {"lam": "x"}, "float"), ("noise_std", None, "float"),
            ("optimizer", {"decay_epochs": [1, "2"]}, "tuple[int, ...]")):
        files.write_json(tmp_path / "config.json", {"select": "last", name: value})
        line = refused(run_folder.read_config, tmp_path)
        assert "Expected" in line and (kind is None or f"to be of type {kind}." in line)
    files.write_json(tmp_path / "config.json", {"select": "last", "noise_std": 0})
    assert run_folder.read_config(tmp_path).noise_std == 0
