"""One pure step on one device, on many, and on those of many hosts.

A step is written once, for the whole batch, as ``make_step(axis_name)``; :func:`compile_step`
compiles it in the form of a :class:`Layout`:

- ``"jit"``: on one device.
- ``"mesh"``: under ``jit``, the batch sharded over all devices, everything else replicated;
  across all processes of a multi-host job.
- ``"pmap"``: ``pmap`` over the devices of one process, with ``axis_name`` for its sums.

All three give the same result up to rounding. A batch whose rows do not divide evenly among
the devices, such as the last one of an epoch, is computed whole on every device.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrobust import _validate

AXIS = "batch"
"""Name of the one device axis, over which batches are split."""

FORMS = ("jit", "pmap", "mesh")
"""Forms of a step; see the module's docstring."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""``(state, shared, rows) -> (state, outputs)``: ``rows`` is a pytree of arrays with a row for
each example of the batch; ``state``, ``shared`` and ``outputs`` are whole on every device."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices that a step runs on, and its form."""

    form: str
    mesh: Mesh  # one axis, AXIS

    @property
    def num_devices(self) -> int:
        """The number of devices over which a batch is split, in all processes together."""
        return self.mesh.size

    def divides(self, size: int) -> bool:
        """Whether a batch of ``size`` rows is split, rather than whole on every device."""
        return size % self.num_devices == 0

    def rows_of(self, size: int) -> slice:
        """The rows of a batch of ``size`` that this process provides."""
        if not self.divides(size):
            return slice(0, size)
        each = size // self.num_devices
        mine = [place for place, device in enumerate(self.mesh.devices.flat)
                if device.process_index == jax.process_index()]
        return slice(mine[0] * each, (mine[-1] + 1) * each)

    def for_examples(self) -> "Layout":
        """The same devices in the form that :func:`map_examples` needs."""
        return dataclasses.replace(self, form="mesh") if self.form == "pmap" else self


def make_layout(
    form: str | None = None, devices: Sequence[jax.Device] | None = None
) -> Layout:
    """Makes a layout over the given devices.

    Args:
      form: one of :data:`FORMS`. None for ``"mesh"`` in a job of several processes or with several
        accelerators, else ``"jit"`` (several CPU devices are only views of the same cores).
      devices: by default all, of all processes; ``"jit"`` takes the first.

    Raises:
      InputError: (a ValueError) for an unknown form, one that does not support several processes,
        or no devices.
    """
    # The devices of a process are adjacent, so that its rows are.
    devices = sorted(jax.devices() if devices is None else devices,
                     key=lambda device: (device.process_index, device.id))
    _validate.in_range("number of devices", len(devices), 1)
    processes = {device.process_index for device in devices}
    if form is None:
        accelerators = len(devices) > 1 and devices[0].platform != "cpu"
        form = "mesh" if len(processes) > 1 or accelerators else "jit"
    _validate.one_of("parallel", form, FORMS)
    if form != "mesh" and len(processes) > 1:
        raise _validate.InputError(
            f"Expected parallel='mesh' in a job of {len(processes)} processes, got {form!r}.")
    if form == "jit":
        devices = devices[:1]
    # In an explicit mesh every contraction over the batch would have to name its sharding.
    return Layout(form, Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,)))


def over_any_mesh(
    function: Callable[..., Any], *, split_as: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Makes ``function`` accept arrays on a mesh whose axes are of type ``Explicit``.

    ``jax.make_mesh`` makes such meshes by default since JAX 0.9. On them every contraction of a
    sharded axis has to name the sharding of its result; inside ``function`` XLA chooses it, as on
    axes of type ``Auto``. For arrays on no mesh, or on such axes, nothing changes.

    Args:
      function: takes and returns pytrees of arrays.
      split_as: takes the same arguments; returns, for the results or subtrees of them, an array
        with the same sharding, or a ``PartitionSpec``. None if all results are whole on every
        device.
    """
    def call(*arguments: Any) -> Any:
        meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arguments)]
        mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if mesh is None:
            return function(*arguments)

        def sharding(leaf: Any) -> NamedSharding:
            spec = leaf if isinstance(leaf, PartitionSpec) else jax.typeof(leaf).sharding.spec
            return NamedSharding(mesh, spec)

        like = PartitionSpec() if split_as is None else split_as(*arguments)
        shardings = jax.tree.map(
            sharding, like, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        return jax.sharding.auto_axes(function, out_sharding=shardings)(*arguments)

    return call


def replicate(layout: Layout, tree: Any) -> Any:
    """Places the leaves on every device of the layout; they must be the same in all processes."""
    if layout.form == "jit":
        return jax.device_put(tree, layout.mesh.devices.flat[0])
    sharding = NamedSharding(layout.mesh, PartitionSpec())

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
                leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(
            sharding, np.asarray(leaf), global_shape=np.shape(leaf))

    return jax.tree.map(place, tree)


def place_batch(layout: Layout, rows: Any, size: int) -> Any:
    """Places a batch on its devices, as the steps of :func:`compile_step` take it.

    It is split over the devices if they divide it, else whole on each of them.

    Args:
      layout: the devices.
      rows: pytree of arrays with this process's rows of the batch, those of ``rows_of(size)``.
      size: rows of the whole batch, >= 1.

    Raises:
      InputError: (a ValueError) if this process does not provide its number of rows, or ``size``
        is out of its range.
    """
    size = _validate.integer("size of a batch", size, 1)
    mine = layout.rows_of(size)
    for leaf in jax.tree.leaves(rows):
        _validate.in_range("rows of a batch", leaf.shape[0], mine.stop - mine.start,
                           mine.stop - mine.start, open_high=False)
    if layout.form == "jit" or not layout.divides(size):
        return replicate(layout, rows)
    sharding = NamedSharding(layout.mesh, PartitionSpec(AXIS))

    def place(leaf: Any) -> jax.Array:
        if layout.form == "pmap":  # It takes the devices as an axis of their own.
            leaf = np.reshape(leaf, (layout.num_devices, -1, *leaf.shape[1:]))
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(
            sharding, np.asarray(leaf), global_shape=(size, *leaf.shape[1:]))

    return jax.tree.map(place, rows)


def compile(layout: Layout, function: Callable[..., Any], *, ynnpack: bool = True,
            **options: Any) -> jax.stages.Wrapped:
    """Applies ``jax.jit``, with its ``options``, so that results are whole on every device."""
    if layout.form != "jit":
        options["out_shardings"] = NamedSharding(layout.mesh, PartitionSpec())
    return jax.jit(function, compiler_options=compiler_options(layout, ynnpack), **options)


def compiler_options(layout: Layout, ynnpack: bool = True) -> dict[str, str]:
    """The options of XLA that make a training step faster, as far as this version knows them.

    Args:
      layout: the devices.
      ynnpack: on CPUs, run elementwise operations and reductions by YNNPACK: less than half the
        time for a step of ResNet18 of width 64, twice the time for one of MobileNetV3, and no
        difference in accuracy beyond rounding. Its maximum and minimum of NaN and a number are the
        number: in a module of your own, ``jnp.where(x <= 0, 0, x)`` keeps the NaN that
        ``jax.nn.relu`` would hide.
    """
    if not ynnpack or layout.mesh.devices.flat[0].platform != "cpu":
        return {}
    return _known_options()


@functools.cache
def _known_options() -> dict[str, str]:
    options = {"xla_cpu_experimental_ynn_fusion_type":
               "LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # The option is experimental and may disappear.
        return {}
    return options


def compile_step(
    layout: Layout, make_step: Callable[[str | None], Step], *, ynnpack: bool = True
) -> Step:
    """Compiles a step for a layout.

    Args:
      layout: the devices.
      make_step: makes the pure step, given the name of the device axis over which its rows are
        split (:data:`AXIS`), or None where they are whole or ``jit`` handles it, such as
        ``lambda axis: make_train_step(model, method, optimizer, axis_name=axis)`` with an
        argument added for what is shared.
      ynnpack: see :func:`compiler_options`.

    Returns:
      The step. Its state must be placed by :func:`replicate` and is donated: it cannot be used
      again. Its rows must be placed by :func:`place_batch`.
    """
    whole = compile(layout, make_step(None), ynnpack=ynnpack, donate_argnums=0)
    if layout.form != "pmap":
        return whole
    mapped = jax.pmap(
        make_step(AXIS), axis_name=AXIS, in_axes=(None, None, 0), out_axes=None,
        donate_argnums=0, devices=list(layout.mesh.devices.flat))

    def step(state: Any, shared: Any, rows: Any) -> tuple[Any, Any]:
        is_split = jax.tree.leaves(rows)[0].sharding.spec == PartitionSpec(AXIS)
        return (mapped if is_split else whole)(state, shared, rows)

    return step


def map_examples(
    layout: Layout, function: Callable[..., Any], *, whole: bool = True
) -> Callable[..., Any]:
    """Splits the rows of a function over the devices, for use inside ``jit``.

    Args:
      layout: the devices; a :meth:`Layout.for_examples`.
      function: ``(shared, rows) -> outputs``; the latter two are pytrees of arrays [B, ...], and
        row i of the outputs depends on row i alone.
      whole: whether the outputs are whole on every device, or split like the rows.

    Returns:
      The same function, for rows placed by :func:`place_batch` whose number the devices divide;
      its outputs are the same for any number of devices.
    """
    if layout.form == "jit":
        return function
    split, everywhere = PartitionSpec(AXIS), PartitionSpec()
    # The devices exchange nothing, so that there is no varying over the axis to check.
    mapped = jax.shard_map(function, mesh=layout.mesh, in_specs=(everywhere, split),
                           out_specs=split, check_vma=False)
    if not whole:
        return mapped

    def call(shared: Any, rows: Any) -> Any:
        return jax.lax.with_sharding_constraint(
            mapped(shared, rows), NamedSharding(layout.mesh, everywhere))

    return call
