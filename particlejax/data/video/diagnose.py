# SPDX-License-Identifier: Apache-2.0
"""Why FFmpeg does not open a file: it says 'Invalid data' of a letter, of noise and of half a film
alike.
"""

import errno
import io
import os
from collections.abc import Iterator
from typing import BinaryIO

NO_INDEX = "truncated: its index is missing"
CUT_HEADER = "truncated: it ends in its header"

# Four letters that a first box of an MP4 or QuickTime file may be called by, after its length.
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
_STARTS = (  # of files that hold moving pictures or sound, as far as they have a fixed beginning
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
# where the first sync byte of a transport stream stands, and how far the next
_TS_PACKETS = ((0, 188), (4, 192))


def why(source: str | bytes, error: Exception) -> str:
    """The reason, in a few words, for which a path or a file's bytes could not be opened."""
    said = f"damaged: {getattr(error, 'strerror', None) or error}"
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(512)
            if isinstance(error, EOFError) or getattr(error, "errno", None) == errno.EIO:
                return CUT_HEADER  # a demuxer knew the file and wanted more of it
            if head[4:8] in _BOXES:
                return _index_fault(file, size) or said
            if head.startswith(b"RIFF") and 8 + int.from_bytes(head[4:8], "little") > size:
                return CUT_HEADER
            return said if head.startswith(_STARTS) or _is_transport(head) else "not a media file"
    except OSError:  # neither can we read it
        return said


def _is_transport(head: bytes) -> bool:
    return any(
        head[at : at + 1] == head[at + step : at + step + 1] == b"G" for at, step in _TS_PACKETS
    )


def _index_fault(file: BinaryIO, size: int) -> str:
    """What is wrong with the index of an MP4, '' where it is all there."""
    ends = [end for kind, end in _boxes(file, size) if kind == b"moov"]
    if not ends:
        return NO_INDEX
    return CUT_HEADER if ends[0] > size else ""


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Names of the boxes at the top of an MP4, and where each ends as its length says."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length < 2:  # 0: to the end of the file; 1: a longer number follows
            length = int.from_bytes(head[8:16], "big") if length else size - at
        yield head[4:8], at + length
        if length < 8:
            return
        at += length
