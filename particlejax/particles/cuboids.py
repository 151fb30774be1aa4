# SPDX-License-Identifier: Apache-2.0
"""Cuts clips into cuboids of any shape, resampled to one payload size; for NumPy and JAX arrays.

Legend: T frames, H rows, W columns, C channels; N particles of P = prod(base) * C values in the
order (t, h, w, c).
"""

import functools
from typing import NamedTuple

import numpy as np
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int, Num

from particlejax.core.typing import Array
from particlejax.particles.types import Particles, array_namespace

Shape = tuple[int, int, int]  # frames, rows, columns


class Tube(NamedTuple):
    """Shape of cuboids, with stride and offset of their lattice, in frames and pixels."""

    shape: Shape
    stride: Shape
    offset: Shape = (0, 0, 0)


@functools.cache
def lattice(size: Shape, tube: Tube) -> Int[np.ndarray, "N 3"]:
    """Returns the first corner of each cuboid inside a clip of `size`, in the order (t, h, w)."""
    axes = [
        np.arange(o, n - s + 1, d)
        for n, s, d, o in zip(size, tube.shape, tube.stride, tube.offset, strict=True)
    ]
    corners = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    corners.flags.writeable = False  # shared by the cache
    return corners


def cut_cuboids(
    video_THWC: Num[Array, "T H W C"], times_T: Float[Array, " T"], tube: Tube, patch_size: Shape
) -> Particles:
    """Cuts all cuboids of a tube and resamples them to `patch_size`: longer axes are averaged,
    shorter ones repeated.

    times_T: start of each frame in seconds; a frame lasts until the next one, the last as long as
    the one before. Payloads have the dtype of the pixels; averages of integers are rounded. Segment
    is 1. Raises ValueError if an axis of tube.shape is neither a multiple nor a divisor of base.
    """
    _check_divisible(tube.shape, patch_size)
    xp = array_namespace(video_THWC)
    size = video_THWC.shape[:3]
    corners = lattice(size, tube)
    cuboids = _gather(video_THWC, corners, tube)
    place, extent = _place_and_extent(times_T, corners, tube, size)
    segment = xp.ones(len(corners), np.int32)
    return Particles(_resample(cuboids, patch_size), place, extent, segment)


def join_cuboids(
    payload_NP: Num[Array, "N P"], size: Shape, patch_size: Shape
) -> Num[Array, "T H W C"]:
    """Returns the video of a complete grid of `patch_size` cuboids: the inverse of `cut_cuboids`
    with shape = stride = base.
    """
    t, h, w = (n // b for n, b in zip(size, patch_size, strict=True))
    return rearrange(
        payload_NP,
        "(t h w) (a b d c) -> (t a) (h b) (w d) c",
        t=t,
        h=h,
        w=w,
        a=patch_size[0],
        b=patch_size[1],
        d=patch_size[2],
    )


def _check_divisible(shape: Shape, patch_size: Shape) -> None:
    if any(s % b and b % s for s, b in zip(shape, patch_size, strict=True)):
        raise ValueError(
            f"a cuboid of {shape} cannot be resampled to patch_size {patch_size}: make each axis a "
            "multiple or a divisor of patch_size."
        )


def _gather(video_THWC: Array, corners: np.ndarray, tube: Tube) -> Array:
    # fast path: a tiling is a reshape
    if tube.stride == tube.shape and tube.offset == (0, 0, 0):
        shape = tube.shape
        t, h, w = (n // d for n, d in zip(video_THWC.shape[:3], shape, strict=True))
        tiled = video_THWC[: t * shape[0], : h * shape[1], : w * shape[2]]
        if array_namespace(video_THWC) is np:
            return _tiles(tiled, (t, h, w), shape)
        return rearrange(
            tiled, "(t a) (h b) (w d) c -> (t h w) a b d c", a=shape[0], b=shape[1], d=shape[2]
        )
    t, h, w = (corners[:, i, None] + np.arange(tube.shape[i]) for i in range(3))
    return video_THWC[t[:, :, None, None], h[:, None, :, None], w[:, None, None, :]]


def _tiles(video: np.ndarray, count: Shape, shape: Shape) -> np.ndarray:
    """Tiles in NumPy: adjacent pixels of a tile are copied as one item, several times faster."""
    (t, h, w), (a, b, d), channels = count, shape, video.shape[-1]
    rows = np.ascontiguousarray(video).reshape(t, a, h, b, w, d * channels)
    items = rows.view(np.dtype((np.void, rows.itemsize * d * channels)))[..., 0]
    tiles = np.ascontiguousarray(items.transpose(0, 2, 4, 1, 3))[..., None].view(video.dtype)
    return tiles.reshape(t * h * w, a, b, d, channels)


def _resample(cuboids: Array, patch_size: Shape) -> Array:
    if cuboids.shape[1:4] == patch_size:
        return rearrange(cuboids, "n t h w c -> n (t h w c)")
    a, b, d = (max(s // n, 1) for s, n in zip(cuboids.shape[1:4], patch_size, strict=True))
    if a * b * d > 1:
        mean = reduce(
            cuboids.astype(np.float32), "n (t a) (h b) (w d) c -> n t h w c", "mean", a=a, b=b, d=d
        )
        is_integer = np.issubdtype(cuboids.dtype, np.integer)
        cuboids = array_namespace(mean).round(mean).astype(cuboids.dtype) if is_integer else mean
    a, b, d = (n // s for s, n in zip(cuboids.shape[1:4], patch_size, strict=True))
    return repeat(cuboids, "n t h w c -> n (t a h b w d c)", a=a, b=b, d=d)


def _place_and_extent(
    times_T: Array, corners: np.ndarray, tube: Tube, size: Shape
) -> tuple[Array, Array]:
    """Returns place and extent, float32 [N, 3], of a tube's cuboids at `corners` of a clip of
    `size`.
    """
    xp, edge = array_namespace(times_T), edges(times_T)
    start, end = edge[corners[:, 0]], edge[corners[:, 0] + tube.shape[0]]
    frame = np.asarray(size[1:], np.float32)
    half = np.asarray(tube.shape[1:], np.float32) / 2
    center = xp.asarray((corners[:, 1:] + half) / frame, np.float32)
    relative_size = xp.asarray(np.broadcast_to(2 * half / frame, center.shape), np.float32)
    place = xp.concatenate([(start + end)[:, None] / 2, center], axis=-1)
    extent = xp.concatenate([(end - start)[:, None], relative_size], axis=-1)
    return place.astype(np.float32), extent.astype(np.float32)


def edges(times_T: Float[Array, " T"]) -> Float[Array, " T+1"]:
    """Returns the start of each frame and the end of the last, which lasts as long as the one
    before.
    """
    xp = array_namespace(times_T)
    last = times_T[-1:] - times_T[-2:-1] if len(times_T) > 1 else xp.zeros(1, np.float32)
    return xp.concatenate([times_T, times_T[-1:] + last])
