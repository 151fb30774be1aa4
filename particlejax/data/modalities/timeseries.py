# SPDX-License-Identifier: Apache-2.0
"""Numeric channels recorded with a clip: a CSV with a column `time` in seconds on the clip's clock.

Legend: n time steps, C channels.
"""

import csv
import io
from pathlib import Path

import numpy as np

from particlejax.config.data import TimeseriesSpec
from particlejax.data.video.decode import Unreadable


def read(
    table: str | bytes, start: float, seconds: float, spec: TimeseriesSpec
) -> np.ndarray | None:
    """Returns channels float32 [n, C], linearly interpolated to `spec.sample_rate` per second from
    `start`.

    Ends where the table ends; None if it has no value at or after `start`. Raises Unreadable for
    missing columns or values that are not numbers.
    """
    try:
        text = (
            table.decode("utf-8-sig")
            if isinstance(table, bytes)
            else Path(table).read_text(encoding="utf-8-sig")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"its series cannot be read: {error}") from None
    rows = list(csv.DictReader(io.StringIO(text), skipinitialspace=True))
    try:
        time = np.array([float(row["time"]) for row in rows])
        values = np.array([[float(row[name]) for name in spec.channels] for row in rows])
    except KeyError as error:
        raise Unreadable(f"its series has no column {error}") from None
    except (TypeError, ValueError) as error:
        raise Unreadable(f"its series holds what is not a number: {error}") from None
    order = np.argsort(time, kind="stable")
    time, values = time[order], values[order]
    if not len(time) or time[-1] < start:
        return None
    sample_times = start + np.arange(round(seconds * spec.sample_rate)) / spec.sample_rate
    sample_times = sample_times[sample_times <= time[-1] + 0.5 / spec.sample_rate]
    return np.stack(
        [np.interp(sample_times, time, channel) for channel in values.T], axis=-1
    ).astype(np.float32)
