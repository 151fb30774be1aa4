# SPDX-License-Identifier: Apache-2.0
"""Numeric channels recorded with a clip: a CSV with a column `time` in seconds on the clip's clock.

Legend: n time steps, C channels.
"""

import math
from pathlib import Path

import numpy as np

from particlejax.config.data import TimeseriesSpec
from particlejax.core import csv_table, text
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError
from particlejax.data.video.decode import Unreadable

_MISSING = frozenset({"", "nan", "na", "n/a", "null", "none"})  # cells without a value, in any case


def read(
    table: str | bytes, start: float, seconds: float, spec: TimeseriesSpec
) -> np.ndarray | None:
    """Returns channels float32 [n, C], linearly interpolated to `spec.sample_rate` per second from
    `start`.

    Ends where the table ends; None if it has no value at or after `start`. Where values are
    missing, `spec.gaps` says what happens: interpolated values (the nearest one at the ends), or
    NaN ('missing'). Raises Unreadable, with file, line and column, for missing columns, values that
    are not numbers, and missing values that are refused or cannot be interpolated.
    """
    name = "its series" if isinstance(table, bytes) else text.escape(table)
    try:
        data = table if isinstance(table, bytes) else Path(table).read_bytes()
        series = csv_table.read(data, name, "time", others=spec.channels)
    except OSError as error:
        raise Unreadable(f"{name} cannot be read ({error.strerror})") from None
    except UserError as error:
        raise Unreadable(str(error).removesuffix(".")) from None
    for channel in spec.channels:
        if channel not in series.columns:
            hint = did_you_mean(channel, series.columns)
            raise Unreadable(f"{name} has no column {channel!r}: {hint}")
    time = np.array([_number(series, row, "time") for row in series.rows])
    values = np.array(
        [
            [_number(series, row, channel, spec.gaps) for channel in spec.channels]
            for row in series.rows
        ]
    )
    order = np.argsort(time, kind="stable")
    time, values = time[order], values[order]
    if not len(time) or time[-1] < start:
        return None
    sample_times = start + np.arange(round(seconds * spec.sample_rate)) / spec.sample_rate
    sample_times = sample_times[sample_times <= time[-1] + 0.5 / spec.sample_rate]
    channels = []
    for channel, column in zip(spec.channels, values.T, strict=True):
        known = np.isfinite(column) if spec.gaps == "interpolate" else np.full(len(time), True)
        if not known.any():
            raise Unreadable(f"{name}: column {channel!r} has no value to interpolate from")
        channels.append(np.interp(sample_times, time[known], column[known]))
    return np.stack(channels, axis=-1).astype(np.float32)


def _number(
    series: csv_table.Table, row: csv_table.Row, column: str, gaps: str = "refuse"
) -> float:
    """Returns a cell's number, NaN if it is missing and may be. Raises Unreadable."""
    cell = row.cells[column]
    if cell.casefold() in _MISSING:
        if gaps == "refuse":
            remedy = (
                "fill it in or remove the line"
                if column == "time"
                else "fill it in, or set config.data.timeseries.gaps"
            )
            raise Unreadable(f"{series.place(row, column)}: the value is missing: {remedy}")
        return math.nan
    value = csv_table.number(cell)
    if value is None or not csv_table.is_finite(value):
        kind = "a number" if value is None else "a finite number"
        raise Unreadable(
            f"{series.place(row, column)}: {cell!r} is not {kind}: correct it, or leave it empty"
        )
    return value
