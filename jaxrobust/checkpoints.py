"""Orbax checkpoints of a train state: the latest few, each with checksums.

A checkpoint is a folder named by its step. It holds the state in ``default``, the facts in
``facts``, with the shapes and the SHA-256 of the state, and the SHA-256 of every file in
``files.json``, which is written last.
"""

import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

import jaxrobust
from jaxrobust import _validate
from jaxrobust._errors import reason_of

_STATE, _FACTS, _SUMS = "default", "facts", "files.json"
_SHA256, _GIVEN, _LEAVES, _FORMAT, _VERSION = "sha256", "facts", "leaves", "format", "version"
FORMAT = 1
"""Of the checkpoints that are written; those of a higher number are refused."""


class Checkpoint(NamedTuple):
    """What :func:`restore_checkpoint` returns."""

    step: int  # under which it was saved
    state: Any
    facts: dict[str, Any] | None  # None if it was saved without


def open_checkpoints(folder: pathlib.Path | str, *, keep: int) -> ocp.CheckpointManager:
    """Opens the checkpoints in a folder, of which the latest ``keep`` >= 1 are kept."""
    _validate.in_range("keep", keep, 1)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.LatestN(keep), enable_async_checkpointing=False,
        create=True)
    # Orbax advises a handler registry in place of names; but without names it takes a step with an
    # item "default" for one unnamed item, and refuses to read two.
    return ocp.CheckpointManager(
        pathlib.Path(folder).absolute(), options=options, item_names=(_STATE, _FACTS))


def save_checkpoint(
    manager: ocp.CheckpointManager, step: int, state: Any,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Saves a state under a step, such as the number of updates or epochs done.

    If the process is killed, the checkpoint is there whole or not at all. An existing one of this
    step with the same facts is kept, since resumed training computes the same bits; one with other
    facts is replaced. Checkpoints of this or later steps that cannot be read, and that
    :func:`restore_checkpoint` thus skipped, are first moved into the folder ``NAME-damaged`` next
    to that of the checkpoints.

    Args:
      manager: from :func:`open_checkpoints`.
      step: larger than that of any readable checkpoint, or equal.
      state: a pytree of arrays, which may be typed PRNG keys.
      facts: returned with the state; anything that JSON can represent.

    Raises:
      InputError: (a ValueError) if there is a later checkpoint that can be read, or one of this or
        a later step holds another kind of state.
      OSError: if the disk has no room for it, or refuses it.
    """
    for there in sorted(known for known in manager.all_steps() if known >= step):
        try:
            found = _read(manager, there, state)
        except OtherState:
            raise
        except _UNREADABLE:
            _set_aside(manager, there)
            continue
        if there > step:
            raise _validate.InputError(
                f"Expected step={step} above {there}, that of a checkpoint in "
                f"{manager.directory}. Resume from that one, or choose another folder.")
        if found.facts == (facts and json.loads(json.dumps(dict(facts)))):
            return
        remove_after(manager, step - 1)
    plain = _without_keys(state)
    _require_room(pathlib.Path(manager.directory), plain)
    args = ocp.args.Composite(**{
        _STATE: ocp.args.StandardSave(plain),
        _FACTS: ocp.args.JsonSave({
            _FORMAT: FORMAT, _VERSION: jaxrobust.__version__, _LEAVES: _leaves(plain),
            _SHA256: _sha256(plain), _GIVEN: facts and dict(facts)})})
    if not manager.save(step, args=args):
        raise _validate.InputError(f"Orbax did not save step={step} in {manager.directory}.")
    if jax.process_index() == 0:
        _write_sums(pathlib.Path(manager.directory) / str(step))


def restore_checkpoint(
    manager: ocp.CheckpointManager, like: Any, *, skipped: list[str] | None = None,
    need_facts: bool = False,
) -> Checkpoint | None:
    """Restores the newest state that can be read; None if there is no checkpoint.

    Args:
      manager: from :func:`open_checkpoints`.
      like: a state of the same structure, shapes and dtypes, with keys of the same implementation.
      skipped: gets a line for each newer checkpoint that could not be read.
      need_facts: whether a checkpoint without facts counts as unreadable.

    Raises:
      InputError: (a ValueError) if there are checkpoints but none can be read, or the newest one
        that can be read holds another kind of state; names what differs.
    """
    skipped = [] if skipped is None else skipped
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = _read(manager, step, like)
            if need_facts and found.facts is None:
                raise ValueError("it was saved without what training needs to resume")
            return found
        except OtherState:
            raise
        except _UNREADABLE as error:
            skipped.append(f"checkpoint {step} cannot be read: {reason_of(error)}")
    if skipped:
        raise _validate.InputError(
            f"No checkpoint in {manager.directory} can be read: {'; '.join(skipped)}")
    return None


def remove_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Removes the checkpoints of steps above ``step``, the newest first."""
    for later in sorted(known for known in manager.all_steps() if known > step)[::-1]:
        if jax.process_index() == 0:
            shutil.rmtree(pathlib.Path(manager.directory) / str(later))
        _reload(manager, f"removed checkpoint {later}")


_UNREADABLE = (ValueError, TypeError, OSError, LookupError)
"""Errors that reading a damaged checkpoint raises."""


class OtherState(_validate.InputError):
    """A checkpoint that is whole, but not of the kind of state that was asked for."""


def _read(manager: ocp.CheckpointManager, step: int, like: Any) -> Checkpoint:
    folder, record = pathlib.Path(manager.directory) / str(step), {}
    _check_sums(folder)
    plain = _without_keys(like)
    # Checkpoints of earlier versions have only a state.
    if (folder / _FACTS).is_dir():
        record = manager.restore(step, args=ocp.args.Composite(
            **{_FACTS: ocp.args.JsonRestore()}))[_FACTS]
        _check_kind(folder, record, _leaves(plain))
    state = manager.restore(step, args=ocp.args.Composite(
        **{_STATE: ocp.args.StandardRestore(plain)}))[_STATE]
    # Orbax returns the bytes as they are, without noticing that one has changed.
    if record.get(_SHA256) is not None and record[_SHA256] != _sha256(state):
        raise ValueError("its content has changed since it was saved (different SHA-256)")
    return Checkpoint(step, _with_keys(state, like), record.get(_GIVEN))


def _require_room(folder: pathlib.Path, state: Any) -> None:
    """Raises OSError if a disk is too full for a state.

    On a full disk Orbax stops at the first file that cannot be written, and TensorStore then prints
    a traceback for each of the others.
    """
    # TensorStore writes the arrays twice, and some 50 small files.
    size = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _leaves(state: Any) -> dict[str, str]:
    """The dtype and shape of each leaf, such as "float32[3,4]", by its path."""
    return {jax.tree_util.keystr(path): f"{np.dtype(leaf.dtype)}{list(np.shape(leaf))}".replace(
        " ", "") for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _check_kind(folder: pathlib.Path, record: dict[str, Any], asked: dict[str, str]) -> None:
    """Raises OtherState if a checkpoint is of a later version, or holds other leaves."""
    if record.get(_FORMAT, 0) > FORMAT:
        raise OtherState(
            f"Expected a checkpoint of format {FORMAT} or lower in {folder}, found format "
            f"{record[_FORMAT]} of jaxrobust {record.get(_VERSION)}. Use that version.")
    there = record.get(_LEAVES, asked)
    differ = [f"{path} {there.get(path, 'missing')}, not {asked.get(path, 'expected')}"
              for path in dict.fromkeys([*asked, *there]) if there.get(path) != asked.get(path)]
    if differ:
        more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise OtherState(f"{folder} holds another kind of state: {'; '.join(differ[:3])}{more}. "
                         "Use the settings, data and version that it was saved with.")


def _sums(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / _SUMS:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256").hexdigest()
    return found


def _write_sums(folder: pathlib.Path) -> None:
    partial = folder / (_SUMS + ".partial")
    sums = _sums(folder)
    partial.write_text(json.dumps({"files": sums, "sha256": _sha256_of(sums)}))
    os.replace(partial, folder / _SUMS)


def _check_sums(folder: pathlib.Path) -> None:
    """Raises ValueError naming a file that is missing or has changed.

    A kill may have come before ``files.json`` was written; the SHA-256 of the state remains.
    """
    if not (folder / _SUMS).is_file():
        return
    stored, there = json.loads((folder / _SUMS).read_text()), _sums(folder)
    if stored["sha256"] != _sha256_of(stored["files"]):
        raise ValueError(f"its file {_SUMS} has changed since it was saved (different SHA-256)")
    for name, digest in stored["files"].items():
        if name not in there:
            raise ValueError(f"its file {name} is missing")
        if there[name] != digest:
            raise ValueError(f"its file {name} has changed since it was saved (different SHA-256)")


def _sha256_of(sums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Moves a checkpoint out of the way; it is kept, since it may still be repaired."""
    source = pathlib.Path(manager.directory) / str(step)
    target = source.parent.with_name(source.parent.name + "-damaged") / source.name
    if jax.process_index() == 0:
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # From an earlier time that this step was damaged.
            shutil.rmtree(target)
        os.replace(source, target)
    _reload(manager, f"damaged checkpoint {step}")


def _reload(manager: ocp.CheckpointManager, why: str) -> None:
    """Has all processes see what the first has changed in the folder."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)
    manager.reload()


def _sha256(state: Any) -> str | None:
    """A digest of all leaves in order; None if this process does not have all of them."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not (
                leaf.is_fully_addressable or leaf.is_fully_replicated):
            return None
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def to_host(state: Any) -> Any:
    """Copies a state to NumPy arrays, keys as their raw data."""
    return jax.tree.map(np.array, _without_keys(state))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(state: Any) -> Any:
    """Replaces typed PRNG keys by their raw data, which can be stored."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _with_keys(state: Any, like: Any) -> Any:
    return jax.tree.map(
        lambda leaf, old: jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(old))
        if _is_key(old) else leaf, state, like)
