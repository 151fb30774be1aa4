# SPDX-License-Identifier: Apache-2.0
"""Converts decoded frames to upright RGB images with square pixels, whole or cropped in one pass.

An image is uint8 [H, W, 3]. A crop goes from the decoder's pixel format to its final size without
intermediate copies.
"""

from typing import NamedTuple

import av
import numpy as np

# minimum short side in pixels at which rounding a box to even pixels (chroma subsampling) is
# negligible
_MIN_FINE_SIDE = 128
# FFmpeg's code for unspecified transfer curve or primaries; scaling must not convert between them
_UNSPECIFIED = 2


class Region(NamedTuple):
    """A square crop of the displayed frame, resized to `size` pixels, optionally `flip` left to
    right.
    """

    # left, top, right, bottom as fractions of the frame's width and height
    box: tuple[float, float, float, float]
    size: int
    flip: bool = False


def center_crop(frames_THWC: np.ndarray, size: int) -> np.ndarray:
    """The square of `size` pixels in the center of each frame."""
    top, left = ((n - size) // 2 for n in frames_THWC.shape[1:3])
    return frames_THWC[:, top : top + size, left : left + size]


def is_fine(width: int, height: int) -> bool:
    """Whether a frame is large enough to be cropped at even pixels."""
    return min(width, height) >= _MIN_FINE_SIDE


class RegionExtractor:
    """Takes the same crop of many frames; `turn` is their display matrix [2, 2]."""

    def __init__(self, region: Region, matrix: np.ndarray) -> None:
        self._region, self._matrix = region, matrix
        self._format: tuple = ()
        self._graph = self._source = self._sink = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        frame_format = (
            frame.width,
            frame.height,
            frame.format.name,
            frame.colorspace,
            frame.color_range,
        )
        if frame_format != self._format:  # the format may change within a video
            self._build(*frame_format)
        frame.color_trc = frame.color_primaries = _UNSPECIFIED
        self._source.push(frame)
        image = upright(pixels(self._sink.pull()), self._matrix)
        # otherwise FFmpeg's hflip does it, faster
        return image[:, ::-1] if self._region.flip and _is_transposed(self._matrix) else image

    def _build(
        self, width: int, height: int, pixel_format: str, color_space: int, color_range: int
    ) -> None:
        self._format, self._graph = (
            (width, height, pixel_format, color_space, color_range),
            av.filter.Graph(),
        )
        self._graph.threads = 1  # the pipeline already runs a decoder per core
        add, size = self._graph.add, self._region.size
        left, top, right, bottom = stored_box(self._region.box, self._matrix, width, height)
        interpolation = "area" if size < right - left else "bilinear"
        # Via planar RGB, for which FFmpeg's scaler has vector code and full chroma.
        steps = [
            (
                "buffer",
                f"video_size={width}x{height}:pix_fmt={pixel_format}:time_base=1/1:"
                f"colorspace={color_space}:range={color_range}",
            ),
            ("crop", f"{right - left}:{bottom - top}:{left}:{top}"),
            ("scale", f"{size}:{size}:flags={interpolation}:out_range=full:interl=-1"),
            ("format", "gbrp"),
            ("scale", f"flags={interpolation}:interl=-1"),
            ("format", "rgb24"),
        ]
        if self._region.flip and not _is_transposed(self._matrix):
            steps.append(("hflip", None))
        nodes = [add(name, args) for name, args in steps] + [add("buffersink")]
        self._graph.link_nodes(*nodes).configure()
        self._source, self._sink = nodes[0], nodes[-1]


def pixels(frame: av.VideoFrame) -> np.ndarray:
    """Returns the pixels of an RGB frame, uint8 [H, W, 3], as a view of its memory."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, -1)
    rows = rows[::-1] if plane.line_size < 0 else rows  # stored from the bottom up
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def stored_box(
    box: tuple[float, ...], matrix: np.ndarray, width: int, height: int
) -> tuple[int, int, int, int]:
    """Converts a box of the displayed frame, in fractions, to left, top, right and bottom pixels of
    the stored frame, all even.
    """
    left, top, right, bottom = box
    transposed = _is_transposed(matrix)
    matrix = matrix[::-1] if transposed else matrix
    if matrix[0, 0] < 0:
        left, right = 1 - right, 1 - left
    if matrix[1, 1] < 0:
        top, bottom = 1 - bottom, 1 - top
    if transposed:
        left, top, right, bottom = top, left, bottom, right
    (left, right), (top, bottom) = _even_span(left, right, width), _even_span(top, bottom, height)
    return left, top, right, bottom


def _even_span(start: float, stop: float, length: int) -> tuple[int, int]:
    first = min(2 * round(start * length / 2), max(length - 2, 0))
    last = length if stop * length > length - 1 else max(2 * round(stop * length / 2), first + 2)
    return first, last


def _is_transposed(matrix: np.ndarray) -> bool:
    return abs(matrix[0, 1]) > abs(matrix[0, 0])


def display_matrix(frame: av.VideoFrame) -> np.ndarray:
    """Returns the map from stored (column, row) to displayed (column, row), [2, 2]; rows are the
    images of the stored axes.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV fails for side data that it does not know (EXIF)
        angle = np.deg2rad(frame.rotation)
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if data is None:
        return np.eye(2)
    return np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / 65536.0  # 16.16 fixed point


def upright(image_HWC: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    # Quarter turns and flips, as cameras write them; other angles are rounded to the nearest.
    if _is_transposed(matrix):
        image_HWC, matrix = image_HWC.transpose(1, 0, 2), matrix[::-1]
    columns, rows = (-1 if matrix[0, 0] < 0 else 1), (-1 if matrix[1, 1] < 0 else 1)
    return image_HWC[::rows, ::columns]


def square_pixel_size(width: int, height: int, aspect: float) -> tuple[int, int]:
    """Returns the size with square pixels; `aspect` is a stored pixel's width / height. It only
    enlarges.
    """
    if abs(aspect - 1) < 1e-3:
        return width, height
    return (_even(width * aspect), height) if aspect > 1 else (width, _even(height / aspect))


def resized_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    if short_side is None:
        return size
    short = min(size)
    return tuple(short_side if side == short else _even(side * short_side / short) for side in size)


def _even(side: float) -> int:
    return max(2, 2 * round(side / 2))
