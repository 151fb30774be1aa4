# SPDX-License-Identifier: Apache-2.0
"""Writes fixtures/odd_files.csv: how many frames FFmpeg's own program decodes of each odd file, and
of what size it shows them.

    python tests/make_odd_files.py [FFMPEG]

FFMPEG: the program, by default the one on the path; the table was made with 9.0.2 (`pip install
imageio-ffmpeg`). Every frame is counted, none doubled or dropped for a steady rate; sizes are
upright and of square pixels. 0 frames: none decodes.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path

import av

FILES = Path(__file__).parents[2] / "shared" / "data" / "odd-files"
TABLE = Path(__file__).parent / "fixtures" / "odd_files.csv"
COLUMNS = ("file", "frames", "width", "height")
# what is not square is widened, as in decode.py
_SQUARE = "scale=w='iw*max(sar,1)':h='ih/min(sar,1)',showinfo"


def best_stream(path: Path) -> int | None:
    """The number of the stream that FFmpeg's library takes for the main one, None where there is no
    video.
    """
    try:
        with av.open(str(path)) as container:
            best = container.streams.best("video")
            return None if best is None else best.index
    except av.FFmpegError:
        return None


def shown(ffmpeg: str, path: Path) -> tuple[int, str, str]:
    """Frames, width and height in pixels."""
    stream = best_stream(path)
    if stream is None:
        return 0, "", ""
    told = subprocess.run(
        [
            ffmpeg,
            "-hide_banner",
            "-i",
            str(path),
            "-map",
            f"0:{stream}",
            "-vf",
            _SQUARE,
            "-fps_mode",
            "passthrough",
            "-f",
            "null",
            "-",
        ],
        capture_output=True,
        text=True,
        errors="replace",
    ).stderr
    sizes = re.findall(r"showinfo.* n: *\d+ .* s:(\d+)x(\d+)", told)
    return (len(sizes), *sizes[0]) if sizes else (0, "", "")


def main() -> None:
    """Writes the table."""
    ffmpeg = sys.argv[1] if len(sys.argv) > 1 else "ffmpeg"
    paths = sorted(path for path in FILES.iterdir() if path.name not in ("README.md", "index.csv"))
    with open(TABLE, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((path.name, *shown(ffmpeg, path)) for path in paths)


if __name__ == "__main__":
    main()
