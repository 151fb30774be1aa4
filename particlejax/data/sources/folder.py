# SPDX-License-Identifier: Apache-2.0
"""A folder of videos as a source, with clips.csv or laid out as split/class/clip or class/clip.

clips.csv has the columns path, split, label, caption, start, end and group, in any case and order;
only path is required. Other columns are read as labels where 'folder:PATH#COLUMN' names one.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from particlejax.core import csv_table, text
from particlejax.core.typing import UserError
from particlejax.data.sources import split_names, stratify
from particlejax.data.sources.records import ListSource, Record, match_classes

VIDEO_SUFFIXES = frozenset(
    ".264 .265 .3g2 .3gp .amv .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2p "
    ".m2t .m2ts .m2v "
    ".m4v .mj2 .mjpeg .mjpg .mkv .mod .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut .obu .ogm .ogv "
    ".qt .rm .rmvb .tod "
    ".tp .ts .vob .webm .wmv .wtv .xvid .y4m".split()
)
_COLUMNS = ("path", "split", "label", "caption", "start", "end", "group")
_MAX_LISTED = 20  # classes, folders or columns in a sentence


@dataclass(frozen=True)
class _ClipRow:
    record: Record  # with label -1
    path: str  # as in clips.csv, relative to the folder, in NFC
    label: str
    split: str  # '': unknown
    stratum: str = ""  # column `label`, by which made splits are stratified whatever is learned


@dataclass(frozen=True)
class _Folder:
    """Everything that a folder says. words: the split of each word that stands there."""

    where: str  # folder:PATH
    rows: tuple[_ClipRow, ...]
    words: dict[str, str]
    notes: tuple[str, ...]


def open_folder(path: str, split: str, classes: tuple[str, ...] | None = None) -> ListSource:
    """Returns the clips of one split, in the order of clips.csv or of their paths.

    If the folder has no splits, a fifth of each class becomes 'val', and the rest 'train'; groups
    (or clips of one file) stay together. Raises UserError for an invalid folder, column, number or
    split.
    """
    folder = _read(path)
    names = tuple(sorted({row.label for row in folder.rows} - {""}))
    selected = _select_split(folder, split)
    if classes is None:
        classes = names
    labels = sorted({row.label for row in selected} - {""})
    index = dict(zip(labels, match_classes(labels, classes, folder.where), strict=True))
    return ListSource(
        classes,
        tuple(replace(row.record, label=index.get(row.label, -1)) for row in selected),
        folder.notes,
    )


def folder_splits(path: str) -> tuple[str, ...]:
    """Returns the splits of a folder, sorted. Raises UserError as `open_folder` does."""
    return tuple(sorted({row.split for row in _read(path).rows}))


def locate_label(path: str, label: str) -> str:
    """Returns where a label stands first: "FILE, line N, column 'COLUMN'", or the folder."""
    path, column = _column(os.path.expanduser(path))
    file = os.path.join(text.find_path(path), "clips.csv")
    if not os.path.exists(file):
        return f"folder:{text.escape(path)}"
    table = _open_table(file, column)
    rows = (row for row in table.rows if row.cells.get(column) == label)
    return next((table.place(row, column) for row in rows), table.name)


def _column(path: str) -> tuple[str, str]:
    """Parses PATH or PATH#COLUMN into the folder and the label column of clips.csv."""
    folder, separator, column = path.rpartition("#")
    return (folder, column) if separator and not os.path.isdir(path) else (path, "label")


def _read(path: str) -> _Folder:
    path, column = _column(os.path.expanduser(path))
    where, path = f"folder:{text.escape(path)}", text.find_path(path)
    if not os.path.isdir(path):
        raise UserError(f"{where} does not exist: check the path.")
    table = os.path.join(path, "clips.csv")
    has_table = os.path.exists(table)
    if column != "label" and not has_table:
        raise UserError(
            f"{where} has no clips.csv to read column {column!r} from: add it, or remove "
            "'#' and the column."
        )
    folder = _read_table(where, path, table, column) if has_table else _read_tree(where, path)
    folder = replace(folder, rows=tuple(_unique_names(folder.rows)))
    twins = _twins({row.label for row in folder.rows})
    if twins:
        note = f"{where}: classes differ only in case and are kept apart: {', '.join(twins)}"
        folder = replace(folder, notes=(*folder.notes, note))
    return _with_splits(folder)


def _twins(labels: set[str]) -> list[str]:
    """Labels that differ from others only in their case."""
    counts = Counter(label.casefold() for label in labels)
    return sorted(label for label in labels if counts[label.casefold()] > 1)[:_MAX_LISTED]


# -- clips.csv


def _open_table(table: str, column: str) -> csv_table.Table:
    try:
        return csv_table.read_file(
            table,
            "path",
            _COLUMNS,
            (column,),
            "give the column of video paths this name, and separate columns by commas",
        )
    except OSError as error:
        raise UserError(
            f"{text.escape(table)} cannot be read ({error.strerror}): check its permissions."
        ) from error


def _read_table(where: str, folder: str, path: str, column: str) -> _Folder:
    table = _open_table(path, column)
    if column != "label" and column not in table.columns:
        raise UserError(
            f"{table.name} has no column {column!r} (it has {', '.join(table.columns)}): "
            "use one of these."
        )
    if not table.rows:
        raise UserError(
            f"{table.name} lists no clip: add a line per clip, or delete it to use folder names."
        )
    without_split = [row for row in table.rows if not row.cells.get("split")]
    if without_split and len(without_split) < len(table.rows):
        raise UserError(
            f"{table.place(without_split[0])}: has no split for "
            f"{without_split[0].cells['path']}, but for other clips: fill in the column for all "
            "clips or for none."
        )
    places: dict[str, str] = {}
    for row in table.rows:
        if row.cells.get("split"):
            places.setdefault(row.cells["split"], table.place(row))
    words = split_names.of_column(places)
    finder = text.PathFinder()
    rows = [_table_row(folder, column, table, row, words, finder) for row in table.rows]
    unread = [name for name in table.columns if name not in (*_COLUMNS, column)]
    note = f"{table.name}: columns that are not read: {', '.join(unread[:_MAX_LISTED])}"
    return _Folder(where, tuple(rows), words, (note,) if unread else ())


def _unique_names(rows: Sequence[_ClipRow]) -> list[_ClipRow]:
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


def _table_row(
    folder: str,
    column: str,
    table: csv_table.Table,
    row: csv_table.Row,
    words: dict[str, str],
    finder: text.PathFinder,
) -> _ClipRow:
    cells, path, place = row.cells, row.cells["path"], table.place(row)
    if not path:
        raise UserError(f"{place}: the path is empty: fill it in or remove the line.")
    start, end = _seconds(cells, "start", place), _seconds(cells, "end", place)
    if end is not None and end <= (start or 0.0):
        raise UserError(
            f"{place}: the end {end:g} is not after the start {start or 0:g}: correct one of them."
        )
    file = finder.find(os.path.join(folder, path))
    record = Record(
        path,
        file,
        caption=cells.get("caption", ""),
        start=start or 0.0,
        end=end,
        series=_series(file, finder),
        group=cells.get("group", ""),
    )
    label, split = cells.get(column, ""), cells.get("split", "")
    return _ClipRow(record, path, label, words.get(split, split), cells.get("label", label))


def _series(file: str, finder: text.PathFinder) -> str:
    """Returns the CSV beside a clip, or ''."""
    table = finder.find(os.path.splitext(file)[0] + ".csv")
    return table if os.path.isfile(table) else ""


def _seconds(cells: Mapping[str, str], column: str, place: str) -> float | None:
    cell = cells.get(column, "")
    if not cell:
        return None
    value = csv_table.number(cell)
    if value is None or not 0 <= value < math.inf:
        raise UserError(
            f"{place}: {column} is {cell!r}: write seconds, such as 2.5, or leave it empty."
        )
    return value


# -- folders as splits and classes


def _read_tree(where: str, folder: str) -> _Folder:
    paths = sorted(_video_paths(folder))
    if not paths:
        raise UserError(
            f"{where} holds no clips.csv and no video (a file such as .mp4, .avi or "
            ".webm): add videos as class/clip.mp4 or split/class/clip.mp4, or a clips.csv."
        )
    words = _split_folders(where, paths)
    finder = text.PathFinder()
    rows = [_tree_row(folder, path, words, finder) for path in paths]
    return _Folder(where, tuple(rows), words, ())


def _split_folders(where: str, paths: Sequence[str]) -> dict[str, str]:
    """Returns the split of each top folder; {} if they are classes. Raises UserError if it is not
    clear which they are.
    """
    folders = [path.split("/")[:-1] for path in paths]
    top = {parents[0] for parents in folders if parents}
    splits = {name for name in top if split_names.is_split(name)}
    if splits and splits == top:
        loose = next((path for path in paths if "/" not in path), None)
        if loose:
            raise UserError(
                f"{where} holds {text.escape(loose)} beside the splits "
                f"{', '.join(sorted(splits))}: move it into one of them."
            )
        return split_names.of_folders(splits, where)
    # one class may be called 'train' too; its clips then lie in it, not in folders of classes
    nested = {parents[0] for parents in folders if len(parents) > 1 and parents[0] in splits} - {
        parents[0] for parents in folders if len(parents) == 1
    }
    if len(splits) > 1 or nested:
        raise UserError(
            f"{where} holds the folders {_listed(splits)}, which mean splits, beside "
            f"{_listed(top - splits)}, which would be classes: move the other folders out of it or "
            "into a split, or list path, split and label of each clip in a clips.csv."
        )
    _refuse_splits_below(where, folders)
    return {}


def _refuse_splits_below(where: str, folders: Sequence[Sequence[str]]) -> None:
    """Raises UserError if splits lie below the top folders, whose clips would be mixed."""
    below = {
        parents[1]: parents[0]
        for parents in folders
        if len(parents) > 1 and split_names.is_split(parents[1])
    }
    if len({split_names.canonical(name) for name in below}) < 2:
        return
    tops = set(below.values())
    remedy = (
        f"use {where}/{text.escape(tops.pop())}"
        if len(tops) == 1 and {parents[0] for parents in folders if parents} == tops
        else "lay it out as split/class/clip.mp4, or list path, split and label of each clip in a "
        "clips.csv"
    )
    found = ", ".join(sorted(f"{text.escape(top)}/{name}" for name, top in below.items()))
    raise UserError(f"{where} holds folders of splits below other folders ({found}): {remedy}.")


def _listed(names: set[str]) -> str:
    shown = sorted(map(text.escape, names))
    return ", ".join(shown[:_MAX_LISTED]) + ", ..." * (len(shown) > _MAX_LISTED)


def _tree_row(folder: str, path: str, words: dict[str, str], finder: text.PathFinder) -> _ClipRow:
    parents = path.split("/")[:-1]
    split = words[parents[0]] if words else ""
    label = parents[bool(words)] if len(parents) > bool(words) else ""
    file, name, label = os.path.join(folder, path), text.escape(path), text.escape(label)
    record = Record(name, file, series=_series(file, finder))
    return _ClipRow(record, name, label, split, label)


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


# -- splits


def _group(row: _ClipRow) -> str:
    return row.record.group or os.path.normpath(row.path)


def _with_splits(folder: _Folder) -> _Folder:
    """Makes the splits train and val of a folder without splits."""
    rows = folder.rows
    if rows[0].split:
        return folder
    strata = [row.stratum for row in rows]
    val = stratify.val_groups([_group(row) for row in rows], strata)
    divided = tuple(replace(row, split="val" if _group(row) in val else "train") for row in rows)
    counts = Counter((row.label, row.split) for row in divided)
    labels = sorted({row.label for row in rows})
    sizes = ", ".join(
        f"{label or 'without a label'} {counts[label, 'train']} + {counts[label, 'val']}"
        for label in labels[:_MAX_LISTED]
    )
    rest = f" and {len(labels) - _MAX_LISTED} others" if len(labels) > _MAX_LISTED else ""
    note = (
        f"{folder.where} names no splits: of each class a fifth becomes val, whole groups. Clips "
        f"of each class in train + val: {sizes}{rest}"
    )
    return replace(folder, rows=divided, notes=(*folder.notes, note))


def _select_split(folder: _Folder, split: str) -> list[_ClipRow]:
    """Returns the rows of a split expression. Parts follow a fixed shuffled order of groups."""
    rows = folder.rows

    def position(i: int) -> tuple[float, float, int]:
        return stratify.name_hash(_group(rows[i])), stratify.name_hash(rows[i].record.name), i

    order = sorted(range(len(rows)), key=position)
    chosen = split_names.Splits([row.split for row in rows], order, folder.words, folder.where)
    return [rows[i] for i in chosen.select(split)]
