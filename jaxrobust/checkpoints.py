"""Orbax checkpoints of a train state: the latest few, and the best."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrobust import _validate


def open_checkpoints(folder: pathlib.Path, *, keep: int) -> ocp.CheckpointManager:
    """The checkpoints in a folder, of which the latest ``keep`` are kept."""
    _validate.in_range("keep", keep, 1)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, create=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save_checkpoint(manager: ocp.CheckpointManager, epoch: int, state: Any) -> None:
    """Saves a state under the number of epochs done, unless that one is there already.

    A run that is taken up again trains the same epochs to the same bits, so what is there
    already is the same.
    """
    if epoch not in manager.all_steps():
        manager.save(epoch, args=ocp.args.StandardSave(_without_keys(state)))


def restore_checkpoint(
    manager: ocp.CheckpointManager, like: Any, *, skipped: list[str] | None = None
) -> tuple[int, Any] | None:
    """The newest state that can be read, with its epoch; None if there is no checkpoint.

    Args:
      manager: from :func:`open_checkpoints`.
      like: a state of the same structure, shapes and dtypes.
      skipped: takes a line for each newer checkpoint that could not be read.

    Raises:
      InputError: (a ValueError) if there are checkpoints and none can be read.
    """
    skipped = [] if skipped is None else skipped
    for epoch in _newest_first(manager):
        try:
            target = ocp.args.StandardRestore(_without_keys(like))
            return epoch, _with_keys(manager.restore(epoch, args=target), like)
        except (ValueError, OSError, KeyError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            skipped.append(f"checkpoint {epoch} cannot be read: {reason[0]}")
    if skipped:
        raise _validate.InputError(
            f"No checkpoint in {manager.directory} can be read: {'; '.join(skipped)}")
    return None


def _newest_first(manager: ocp.CheckpointManager) -> Iterator[int]:
    return iter(sorted(manager.all_steps(), reverse=True))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(state: Any) -> Any:
    """Typed PRNG keys as their raw data, which is what can be stored."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _with_keys(state: Any, like: Any) -> Any:
    return jax.tree.map(
        lambda leaf, old: jax.random.wrap_key_data(leaf) if _is_key(old) else leaf, state, like)
