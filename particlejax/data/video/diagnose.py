# SPDX-License-Identifier: Apache-2.0
"""Finds why FFmpeg cannot open a file; its own 'Invalid data' covers text, noise and truncated
videos alike.
"""

import errno
import io
import os
from collections.abc import Iterator
from typing import BinaryIO

NO_INDEX = "truncated: its index is missing"
CUT_HEADER = "truncated: it ends in its header"

# Valid types of the first box of an MP4 or QuickTime file, after its length.
_BOXES = frozenset(
    {
        b"ftyp",
        b"styp",
        b"moov",
        b"moof",
        b"mdat",
        b"sidx",
        b"wide",
        b"free",
        b"skip",
        b"pnot",
        b"uuid",
    }
)
_SIGNATURES = (  # magic numbers of video and audio files
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"RIFF",
    b"OggS",
    b"FLV",
    b"GIF8",
    b"YUV4MPEG2",
    b"DKIF",
    b".RMF",
    b"ID3",
    b"fLaC",
    b"nut/multimedia",
    b"0&\xb2u\x8ef\xcf\x11",  # ASF: WMV, WMA
    b"\x06\x0e+4",  # MXF
    b"\x00\x00\x01\xba",
    b"\x00\x00\x01\xb3",
    b"\x00\x00\x00\x01",
    b"\x00\x00\x01\x67",  # MPEG, H.264 and H.265 streams
)
# offset of a transport stream's first sync byte, and distance to the next
_TS_PACKETS = ((0, 188), (4, 192))


def open_failure_reason(source: str | bytes, error: Exception) -> str:
    """Returns a short reason why a path or a file's bytes cannot be opened."""
    default_reason = f"damaged: {getattr(error, 'strerror', None) or error}"
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(512)
            if isinstance(error, EOFError) or getattr(error, "errno", None) == errno.EIO:
                return CUT_HEADER  # a demuxer recognized the file, but it ended early
            if head[4:8] in _BOXES:
                return _index_problem(file, size) or default_reason
            if head.startswith(b"RIFF") and 8 + int.from_bytes(head[4:8], "little") > size:
                return CUT_HEADER
            return (
                default_reason
                if head.startswith(_SIGNATURES) or _is_transport_stream(head)
                else "not a media file"
            )
    except OSError:  # the file cannot be read at all
        return default_reason


def _is_transport_stream(head: bytes) -> bool:
    return any(
        head[offset : offset + 1] == head[offset + step : offset + step + 1] == b"G"
        for offset, step in _TS_PACKETS
    )


def _index_problem(file: BinaryIO, size: int) -> str:
    """Returns the problem of an MP4's index; '' if it is complete."""
    ends = [end for kind, end in _boxes(file, size) if kind == b"moov"]
    if not ends:
        return NO_INDEX
    return CUT_HEADER if ends[0] > size else ""


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Yields the type of each top-level box of an MP4, and its end according to its length."""
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length < 2:  # 0: to the end of the file; 1: a longer number follows
            length = int.from_bytes(head[8:16], "big") if length else size - offset
        yield head[4:8], offset + length
        if length < 8:
            return
        offset += length
