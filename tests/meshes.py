# SPDX-License-Identifier: Apache-2.0
"""Every objective on every shape of mesh: the first step's loss and gradients on eight devices
against those on one.

    XLA_FLAGS='--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true' \
        python tests/meshes.py [OBJECTIVE ...]

A row for each of the battery's objectives (test_objectives.py), a column for each mesh: the largest
difference of a gradient over the largest number of that gradient, after the loss's own. Ends with
code 1 where one is above the tolerance. The suite holds one pair of objectives to this on three
meshes (test_sharding.py); all of them take five minutes of a core.
"""

import dataclasses
import os
import sys
import warnings
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import test_objectives as battery

from particlejax.config.experiment import MeshSpec
from particlejax.core import tree
from particlejax.distributed import sharding
from particlejax.objectives.base import TEACHER
from particlejax.particles.types import Batch

MESHES = {
    "data 8": MeshSpec(data=8),
    "data, fsdp, tensor": MeshSpec(data=2, fsdp=2, tensor=2),
    "data, sequence": MeshSpec(data=2, sequence=4),
    "fsdp, tensor, sequence": MeshSpec(data=1, fsdp=2, tensor=2, sequence=2),
}
# The battery hides by motion, and particles that move alike are told apart by rounding, which
# meshes do differently.
battery.CASES["jepa"] = dataclasses.replace(
    battery.CASES["jepa"], spec=dict(keep=0.5, predict=0.5, mask="random")
)
LOSS, GRADIENT = 2e-5, 2e-3


def first_step(name: str, mesh: jax.sharding.Mesh) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients by path."""
    objective, model = battery.setup(name)
    batch = battery.make_batch(battery.CASES[name].modalities)
    if name == "pseudo_label":
        batch = dataclasses.replace(batch, label=jnp.full_like(batch.label, -1))
    start = jax.jit(model.init)(jax.random.key(0), batch)

    def step(params: dict, batch: Batch) -> tuple:
        branch = {TEACHER: params} if name == "jepa" else {}
        return jax.value_and_grad(
            lambda p: objective({**p, **branch}, model, batch, jax.random.key(1), True)[0]
        )(params)

    placed = jax.device_put(start, sharding.param_shardings(start, mesh))
    with warnings.catch_warnings():
        # some lengths are odd
        warnings.filterwarnings("ignore", "config.mesh.sequence=. does not divide rows")
        loss, grads = jax.jit(sharding.with_mesh(mesh, step))(
            placed, sharding.shard_batch(batch, mesh)
        )
    return float(loss), {path: np.asarray(each) for path, each in tree.flatten(grads).items()}


def main(names: list[str]) -> int:
    """Prints the table; the number of cells above the tolerance."""
    print(
        "| objective | " + " | ".join(MESHES) + " |\n|---" + "|---" * len(MESHES) + "|", flush=True
    )
    wrong = 0
    for name in names or list(battery.CASES):
        one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES)
        loss, grads = first_step(name, one)
        cells = []
        for spec in MESHES.values():
            other, found = first_step(name, sharding.make_mesh(spec))
            # A bias of the keys has no gradient but rounding, as softmax takes no notice of it.
            least = 1e-4 * max(np.abs(g).max() for g in grads.values())
            apart = max(
                np.abs(found[path] - g).max() / max(np.abs(g).max(), least)
                for path, g in grads.items()
            )
            off = abs(other - loss) / abs(loss)
            bad = not (off <= LOSS and apart <= GRADIENT)
            wrong += bad
            cells.append(f"{off:.0e}, {apart:.0e}" + (" WRONG" if bad else ""))
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
