# SPDX-License-Identifier: Apache-2.0
"""A folder of videos as a source, with clips.csv or laid out as split/class/clip or class/clip."""

import csv
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from particlejax.core.typing import UserError
from particlejax.data.sources.records import SPLIT_NAMES, ListSource, Record, match_classes

VIDEO_SUFFIXES = frozenset(
    ".264 .265 .3g2 .3gp .amv .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2p "
    ".m2t .m2ts .m2v "
    ".m4v .mj2 .mjpeg .mjpg .mkv .mod .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut .obu .ogm .ogv "
    ".qt .rm .rmvb .tod "
    ".tp .ts .vob .webm .wmv .wtv .xvid .y4m".split()
)
_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})
_TRAIN_FRACTION = 0.8  # fraction of training groups if the folder has no splits


@dataclass(frozen=True)
class _ClipRow:
    record: Record  # with label -1
    path: str  # as in clips.csv, relative to the folder
    label: str
    split: str  # '': unknown


def open_folder(path: str, split: str, classes: tuple[str, ...] | None = None) -> ListSource:
    """Returns the clips of one split, in the order of clips.csv or of their paths.

    If the folder has no splits, 80 % of the groups (or clips without a group) are 'train' and 20 %
    'val', by a hash of their name. Raises UserError for an invalid folder, column, number or split.
    """
    path, column = _column(os.path.expanduser(path))
    rows = _rows(path, column)
    names = tuple(sorted({row.label for row in rows} - {""}))
    selected = _select_split(rows, split, path)
    if classes is None:
        classes = names
    labels = sorted({row.label for row in selected} - {""})
    index = dict(zip(labels, match_classes(labels, classes, f"folder:{path}"), strict=True))
    return ListSource(
        classes, tuple(replace(row.record, label=index.get(row.label, -1)) for row in selected)
    )


def folder_splits(path: str) -> tuple[str, ...]:
    """Returns the splits of a folder, sorted. Raises UserError as `open_folder` does."""
    return tuple(sorted({row.split for row in _rows(*_column(os.path.expanduser(path)))}))


def _column(path: str) -> tuple[str, str]:
    """Parses PATH or PATH#COLUMN into the folder and the label column of clips.csv."""
    folder, separator, column = path.rpartition("#")
    return (folder, column) if separator and not os.path.isdir(path) else (path, "label")


def _rows(path: str, column: str) -> list[_ClipRow]:
    if not os.path.isdir(path):
        raise UserError(f"folder:{path} does not exist: check the path.")
    table = os.path.join(path, "clips.csv")
    if column != "label" and not os.path.exists(table):
        raise UserError(
            f"folder:{path} has no clips.csv to read column {column!r} from: add it, or remove "
            "'#' and the column."
        )
    return _with_splits(
        _read_table(path, table, column) if os.path.exists(table) else _read_tree(path)
    )


def _read_table(folder: str, table: str, column: str) -> list[_ClipRow]:
    try:
        # -sig, because spreadsheets write a byte order mark
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = [str(name).strip() for name in reader.fieldnames or ()]
            if "path" not in reader.fieldnames:
                raise UserError(
                    f"{table} has no column 'path' (it has "
                    f"{', '.join(reader.fieldnames) or 'none'}): give the column of video paths "
                    "this name, and separate columns by commas."
                )
            if column != "label" and column not in reader.fieldnames:
                raise UserError(
                    f"{table} has no column {column!r} (it has {', '.join(reader.fieldnames)}): "
                    "use one of these."
                )
            rows = [
                _table_row(folder, column, fields, f"{table}, line {reader.line_num}")
                for fields in reader
            ]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{table} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from error
    if not rows:
        raise UserError(
            f"{table} lists no clip: add a line per clip, or delete it to use folder names."
        )
    without_split = [row for row in rows if not row.split]
    if without_split and len(without_split) < len(rows):
        raise UserError(
            f"{table} has no split for {without_split[0].record.name}, but for other clips: fill "
            "in the column for all clips or for none."
        )
    return _unique_names(rows)


def _unique_names(rows: list[_ClipRow]) -> list[_ClipRow]:
    """Makes the names of clips of one file unique by start and end, then by a number."""
    counts = Counter(row.path for row in rows)
    num_seen: Counter[str] = Counter()
    named = []
    for row in rows:
        name = row.path
        if counts[name] > 1:
            end = "" if row.record.end is None else f"{row.record.end:.10g}"
            name = f"{name}@{row.record.start:.10g}-{end}"
            num_seen[name] += 1
            name += f"#{num_seen[name]}" * (num_seen[name] > 1)
        named.append(replace(row, record=replace(row.record, name=name)))
    return named


def _table_row(folder: str, column: str, fields: dict[str, str | None], line: str) -> _ClipRow:
    fields = {
        name: (value or "").strip()
        for name, value in fields.items()
        if isinstance(name, str) and name
    }
    path = fields["path"]
    if not path:
        raise UserError(f"{line}: the path is empty: fill it in or remove the line.")
    start, end = _seconds(fields, "start", line), _seconds(fields, "end", line)
    if end is not None and end <= (start or 0.0):
        raise UserError(
            f"{line}: the end {end:g} is not after the start {start or 0:g}: correct one of them."
        )
    record = Record(
        path,
        os.path.join(folder, path),
        caption=fields.get("caption", ""),
        start=start or 0.0,
        end=end,
        series=_series(folder, path),
        group=fields.get("group", ""),
    )
    split = fields.get("split", "")
    return _ClipRow(record, path, fields.get(column, ""), SPLIT_NAMES.get(split, split))


def _series(folder: str, path: str) -> str:
    """Returns the CSV beside a clip, or ''."""
    table = os.path.join(folder, os.path.splitext(path)[0] + ".csv")
    return table if os.path.isfile(table) else ""


def _seconds(fields: dict[str, str], column: str, line: str) -> float | None:
    text = fields.get(column, "")
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not 0 <= value < math.inf:
        raise UserError(
            f"{line}: {column} is {text!r}: write seconds, such as 2.5, or leave it empty."
        )
    return value


def _read_tree(folder: str) -> list[_ClipRow]:
    paths = sorted(_video_paths(folder))
    if not paths:
        raise UserError(
            f"folder:{folder} holds no clips.csv and no video (a file such as .mp4, .avi or "
            ".webm): add videos as class/clip.mp4 or split/class/clip.mp4, or a clips.csv."
        )
    top_folders = {path.split("/")[0] for path in paths if "/" in path}
    # a class may be called 'train' too, but then there are other classes
    has_splits = bool(top_folders) and top_folders <= _SPLITS
    top_level_videos = [path for path in paths if "/" not in path]
    if has_splits and top_level_videos:
        raise UserError(
            f"folder:{folder} holds {top_level_videos[0]} beside the splits "
            f"{', '.join(sorted(top_folders))}: move it into one of them."
        )
    return [_tree_row(folder, path, has_splits) for path in paths]


def _tree_row(folder: str, path: str, has_splits: bool) -> _ClipRow:
    parents = path.split("/")[:-1]
    split = SPLIT_NAMES.get(parents[0], parents[0]) if has_splits else ""
    label = parents[int(has_splits)] if len(parents) > int(has_splits) else ""
    return _ClipRow(
        Record(path, os.path.join(folder, path), series=_series(folder, path)), path, label, split
    )


def _video_paths(folder: str) -> Iterator[str]:
    """Yields paths relative to `folder`, with slashes; enters linked folders once and skips hidden
    ones.
    """
    visited = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(directory)
        folders[:] = (
            []
            if real_path in visited
            else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        )
        if real_path not in visited:
            for file in files:
                if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES and not file.startswith("."):
                    yield os.path.relpath(os.path.join(directory, file), folder).replace(
                        os.sep, "/"
                    )
        visited.add(real_path)


def _group(row: _ClipRow) -> str:
    return row.record.group or row.path


def _hash(text: str) -> float:
    """Returns a number in [0, 1) that is the same in every process and on every machine."""
    return (
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6], "big")
        / 2**48
    )


def _with_splits(rows: list[_ClipRow]) -> list[_ClipRow]:
    if rows[0].split:
        return rows
    groups = sorted({_group(row) for row in rows}, key=_hash)
    train = {group for group in groups if _hash(group) < _TRAIN_FRACTION}
    if len(groups) > 1:  # few groups may all fall on one side: give both splits at least one
        train = (train | {groups[0]}) - ({groups[-1]} if len(train) == len(groups) else set())
    return [replace(row, split="train" if _group(row) in train else "val") for row in rows]


def _select_split(rows: Sequence[_ClipRow], split: str, folder: str) -> list[_ClipRow]:
    """Returns the rows of a split expression: NAME or NAME[from:to], joined by +."""
    selected: set[int] = set()
    for part in split.replace(" ", "").split("+"):
        selected |= _split_part(rows, part, folder)
    if not selected:
        raise UserError(
            f"split {split!r} of folder:{folder} selects no clip: widen the range in brackets."
        )
    return [rows[i] for i in sorted(selected)]


def _split_part(rows: Sequence[_ClipRow], part: str, folder: str) -> set[int]:
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", part)
    if not match:
        raise UserError(
            f"split {part!r} of folder:{folder} is malformed: write a name, or a part like "
            "'train[:90%]' or 'train[10:20]'."
        )
    name = SPLIT_NAMES.get(match[1], match[1])
    members = [i for i, row in enumerate(rows) if row.split == name]
    if not members:
        known = ", ".join(sorted({row.split for row in rows}))
        raise UserError(f"folder:{folder} has no split {match[1]!r}: use one of {known}.")
    members.sort(key=lambda i: (_hash(_group(rows[i])), _hash(rows[i].record.name), i))
    return set(_slice(members, match[2], match[3]))


def _slice(members: list[int], first: str | None, last: str | None) -> Iterable[int]:
    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(len(members) * int(text[:-1]) / 100) if text.endswith("%") else int(text)

    return members[bound(first) : bound(last)]
