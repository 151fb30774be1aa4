# SPDX-License-Identifier: Apache-2.0
"""Run-length particles (RLT, arXiv:2411.05222): a cuboid similar to the previous one extends it.

Legend: T frames, H rows, W columns, C channels; t, n cuboids in time and in the frame.
"""

import numpy as np
from jaxtyping import Float, Num

from particlejax.config.data import ParticleSpec
from particlejax.core.typing import Array
from particlejax.particles.adaptive import compact_slots, unsort
from particlejax.particles.cuboids import Tube, cut_cuboids
from particlejax.particles.types import Particles, array_namespace


def run_length(
    video_THWC: Num[Array, "T H W C"], times_T: Float[Array, " T"], spec: ParticleSpec
) -> Particles:
    """Returns the first cuboid of each run, with place and extent of the whole run.

    A cuboid begins a run if it differs from the previous one by more than `spec.run_threshold`
    (mean absolute difference, 0 to 255); with a budget, only the most different ones do. In JAX,
    unused slots come last with segment 0; NumPy omits them.
    """
    xp, t = array_namespace(video_THWC), video_THWC.shape[0] // spec.patch_size[0]
    cuboids = cut_cuboids(
        video_THWC, times_T, Tube(spec.patch_size, spec.patch_size), spec.patch_size
    )
    # integers: sums are exact
    pixels = cuboids.payload.reshape(t, -1, cuboids.payload.shape[-1]).astype(np.int32)
    difference = abs(pixels[1:] - pixels[:-1]).sum(axis=-1).astype(np.float32) * np.float32(
        1 / pixels.shape[-1]
    )
    # the first cuboid always begins a run
    difference = xp.concatenate([xp.full((1, pixels.shape[1]), np.inf, np.float32), difference])
    starts_run = difference > spec.run_threshold
    if spec.budget:
        order = xp.argsort(-difference.reshape(-1), stable=True)
        starts_run &= unsort(xp.arange(len(order)) < spec.budget, order).reshape(starts_run.shape)
    place, extent = (values.reshape(t, -1, 3) for values in (cuboids.place, cuboids.extent))
    durations = _run_durations(starts_run, extent[..., 0], xp)
    start = place[..., 0] - extent[..., 0] / 2
    place = xp.concatenate([(start + durations / 2)[..., None], place[..., 1:]], axis=-1).reshape(
        -1, 3
    )
    extent = xp.concatenate([durations[..., None], extent[..., 1:]], axis=-1).reshape(-1, 3)
    order, segment = compact_slots(starts_run.reshape(-1), spec.budget or starts_run.size)
    return Particles(cuboids.payload[order], place[order], extent[order], segment)


def _run_durations(starts_run: Array, durations: Array, xp: object) -> Array:
    """Returns seconds from each cuboid's start to the next run at its position, [t, n]."""
    run_durations = [durations[-1]]
    for index in range(len(starts_run) - 2, -1, -1):
        run_durations.append(
            durations[index] + xp.where(starts_run[index + 1], np.float32(0), run_durations[-1])
        )
    return xp.stack(run_durations[::-1])
