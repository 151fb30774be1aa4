# SPDX-License-Identifier: Apache-2.0
"""Numeric channels that were recorded with a clip: a CSV with a column `time`, read on the clip's
own clock.

Legend: n values in time, C channels.
"""

import csv
import io
from pathlib import Path

import numpy as np

from particlejax.config.experiment import TimeseriesSpec
from particlejax.data.video.decode import Unreadable


def read(
    table: str | bytes, start: float, seconds: float, spec: TimeseriesSpec
) -> np.ndarray | None:
    """Channels float32 [n, C], interpolated linearly to `spec.rate` per second from `start` on.

    Ends where the table ends; None where it has nothing at `start` or later. Raises Unreadable for
    a table without the columns or with what is not a number.
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
    wanted = start + np.arange(round(seconds * spec.sample_rate)) / spec.sample_rate
    wanted = wanted[wanted <= time[-1] + 0.5 / spec.sample_rate]
    return np.stack([np.interp(wanted, time, channel) for channel in values.T], axis=-1).astype(
        np.float32
    )
