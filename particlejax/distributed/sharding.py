# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and sharding rules by parameter path."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from particlejax.config.training import MeshSpec
from particlejax.core import tree
from particlejax.core.typing import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")  # axes over which a batch's rows are divided

# Last axes of a parameter (and of its optimizer moments, whose paths have the same ending) -> mesh
# axes; leading axes of stacked layers are not sharded.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/down/kernel$", ("tensor", "fsdp")),
    (r"kernel$|table/embedding$", (None, "fsdp")),
    (r"", ()),
)


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the four named axes over `devices`, by default all devices. Raises UserError if
    their number does not fit.
    """
    sizes, num_devices = (
        [getattr(spec, axis) for axis in AXES],
        jax.device_count() if devices is None else len(devices),
    )
    remaining, remainder = divmod(num_devices, math.prod(size for size in sizes if size != -1))
    sizes = [remaining if size == -1 else size for size in sizes]
    if remainder or math.prod(sizes) != num_devices:
        raise UserError(
            f"config.mesh is {dict(zip(AXES, sizes, strict=True))}, but there are {num_devices} "
            "devices: make the product equal to that number, or set one axis to -1."
        )
    # A mesh axis may use part of a torus axis, else data=8, fsdp=8 fails on 4x4x4 chips.
    grid = mesh_utils.create_device_mesh(
        sizes, jax.devices() if devices is None else devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a tree of shapes (parameters, or a state).

    Warns if fsdp divides no axis of most of it, so that every device holds a full copy.
    """
    shardings = tree.map_named(
        lambda name, leaf: NamedSharding(mesh, _spec(name, leaf.shape, mesh)), shapes
    )
    if mesh.shape["fsdp"] > 1:
        sizes = tree.flatten(jax.tree.map(lambda leaf: math.prod(leaf.shape), shapes))
        replicated = {
            name
            for name, leaf_sharding in tree.flatten(shardings).items()
            if "fsdp" not in leaf_sharding.spec
        }
        fraction = sum(sizes[name] for name in replicated) / max(sum(sizes.values()), 1)
        if fraction > 0.5:
            warnings.warn(
                f"config.mesh.fsdp={mesh.shape['fsdp']} divides no axis of {fraction:.0%} of the "
                "parameters and their moments, so every device holds a full copy: use a divisor "
                "of config.model.width, and data for the rest.",
                stacklevel=2,
            )
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are sharded over data and fsdp, other axes are not."""
    return NamedSharding(mesh, P(BATCH_AXES))


def with_mesh(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """f, run with the mesh in context, for sharding constraints and shard_map inside it."""

    @functools.wraps(fn)
    def wrapped(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return wrapped


def constrain_sequence(x_BLD: jax.Array) -> jax.Array:
    """Shards tokens [B, L, D] over rows and sequence, if the mesh of `with_mesh` has a sequence
    axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["sequence"] == 1:
        return x_BLD
    if x_BLD.shape[1] % mesh.shape["sequence"]:
        warnings.warn(
            f"config.mesh.sequence={mesh.shape['sequence']} does not divide rows of "
            f"{x_BLD.shape[1]} tokens: each of its devices computes all of them.",
            stacklevel=2,
        )
        return x_BLD
    row_axes = (
        BATCH_AXES
        if x_BLD.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0
        else None
    )
    return jax.lax.with_sharding_constraint(x_BLD, P(row_axes, "sequence"))


def describe(mesh: Mesh) -> str:
    """Devices, processes and mesh in one line."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    axes = (
        ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    )
    processes = jax.process_count()
    plural = "es" if processes > 1 else ""
    return f"{mesh.size} x {', '.join(kinds)}, {processes} process{plural}, mesh {axes}"


def row_divisor(mesh: Mesh) -> int:
    """The number of rows of a batch must be a multiple of this."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_rows(rows: int, mesh: Mesh, key: str) -> None:
    """Raises UserError if `rows` cannot be divided over the mesh."""
    num_shards = row_divisor(mesh)
    if rows % num_shards:
        raise UserError(
            f"{key}={rows} cannot be divided over {num_shards} devices (mesh data x fsdp): use a "
            "multiple."
        )


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """(i, n): the rows of a batch are loaded in n parts; this process loads part i.

    Processes whose devices hold the same rows (tensor or sequence spans processes) load the same
    part. Raises UserError if processes hold partly overlapping rows.
    """
    rows_by_process: dict[int, set[int]] = {}
    for (data, fsdp, *_), device in np.ndenumerate(mesh.devices):
        rows_by_process.setdefault(device.process_index, set()).add(
            data * mesh.shape["fsdp"] + fsdp
        )
    parts = sorted({tuple(sorted(rows)) for rows in rows_by_process.values()})
    if len({len(part) for part in parts}) > 1 or len(set().union(*parts)) != sum(map(len, parts)):
        raise UserError(
            f"config.mesh={dict(mesh.shape)} makes processes share only some rows: make tensor x "
            "sequence a divisor or a multiple of the devices of a process."
        )
    return parts.index(tuple(sorted(rows_by_process[jax.process_index()]))), len(parts)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh; each process passes its own rows (`process_slice`), numpy [B / n,
    ...].
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    axes = tree.match(RULES, name)
    if not axes or len(shape) < len(axes):
        return P()
    leading = (None,) * (len(shape) - len(axes))
    trailing = (
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape[len(leading) :], strict=True)
    )
    return P(*leading, *trailing)
