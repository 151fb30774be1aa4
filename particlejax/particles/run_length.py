# SPDX-License-Identifier: Apache-2.0
"""Run-length particles (RLT, arXiv:2411.05222): a cuboid similar to the previous one extends it.

Legend: T frames, H rows, W columns, C channels; t, n cuboids in time and in the frame.
"""

import numpy as np
from jaxtyping import Float, Num

from particlejax.config.experiment import ParticleSpec
from particlejax.core.typing import Array
from particlejax.particles.adaptive import slots, unsort
from particlejax.particles.cuboids import Tube, cut
from particlejax.particles.types import Particles, numpy_of


def runs(
    video_THWC: Num[Array, "T H W C"], times_T: Float[Array, " T"], spec: ParticleSpec
) -> Particles:
    """Returns the first cuboid of each run, with place and extent of the whole run.

    A cuboid begins a run if it differs from the previous one by more than `spec.run_threshold`
    (mean absolute difference, 0 to 255); with a budget, only the most different ones do. In JAX,
    unused slots come last with segment 0; NumPy omits them.
    """
    xp, t = numpy_of(video_THWC), video_THWC.shape[0] // spec.patch_size[0]
    whole = cut(video_THWC, times_T, Tube(spec.patch_size, spec.patch_size), spec.patch_size)
    # integers: sums are exact
    cells = whole.payload.reshape(t, -1, whole.payload.shape[-1]).astype(np.int32)
    change = abs(cells[1:] - cells[:-1]).sum(axis=-1).astype(np.float32) * np.float32(
        1 / cells.shape[-1]
    )
    # the first cuboid always begins a run
    change = xp.concatenate([xp.full((1, cells.shape[1]), np.inf, np.float32), change])
    begins = change > spec.run_threshold
    if spec.budget:
        order = xp.argsort(-change.reshape(-1), stable=True)
        begins &= unsort(xp.arange(len(order)) < spec.budget, order).reshape(begins.shape)
    place, extent = (each.reshape(t, -1, 3) for each in (whole.place, whole.extent))
    length = _until_next(begins, extent[..., 0], xp)
    start = place[..., 0] - extent[..., 0] / 2
    place = xp.concatenate([(start + length / 2)[..., None], place[..., 1:]], axis=-1).reshape(
        -1, 3
    )
    extent = xp.concatenate([length[..., None], extent[..., 1:]], axis=-1).reshape(-1, 3)
    order, segment = slots(begins.reshape(-1), spec.budget or begins.size)
    return Particles(whole.payload[order], place[order], extent[order], segment)


def _until_next(begins: Array, seconds: Array, xp: object) -> Array:
    """Returns seconds from each cuboid's start to the next run at its position, [t, n]."""
    lengths = [seconds[-1]]
    for step in range(len(begins) - 2, -1, -1):
        lengths.append(seconds[step] + xp.where(begins[step + 1], np.float32(0), lengths[-1]))
    return xp.stack(lengths[::-1])
