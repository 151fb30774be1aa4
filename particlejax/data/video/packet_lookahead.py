# SPDX-License-Identifier: Apache-2.0
"""Packet lookahead: marks packets whose frames are requested, and stops after the last of them."""

import math
from collections import deque
from collections.abc import Iterator
from itertools import islice

import av
import numpy as np

from particlejax.data.video import container

_BATCH_SIZE = 64  # packets per batch: marking is as slow as converting a small frame
_END = 2**62  # timestamp of the empty packet that ends a stream
_TIME_EPS = 1e-6  # tolerance in seconds between a requested time and a frame's


class PacketLookahead:
    """Yields the packets of a stream in decoding order, each with whether its frame is on display
    at a requested time.

    wanted: ascending, seconds on the container's clock; None: every frame. It may change between
    packets. After the last requested frame, None follows instead of the rest, to flush the decoder.
    """

    def __init__(
        self, packets: Iterator[av.Packet | None], tick: float, wanted: np.ndarray | None
    ) -> None:
        self.wanted = wanted
        self._packets, self._tick = packets, tick
        self._pending: deque[av.Packet | None] = deque()
        self._stamps: deque[int | None] = deque()  # of waiting packets
        # of yielded packets: some are shown after a waiting one
        self._given: deque[int | None] = deque(maxlen=container.REORDER)
        self._ended = False

    def __iter__(self) -> Iterator[tuple[av.Packet | None, bool]]:
        while self._fill():
            wanted = self.wanted
            num_needed = self._num_needed(wanted)
            if not num_needed:
                yield None, True
                return
            for is_shown in self._are_shown(wanted)[:num_needed]:
                self._given.append(self._stamps.popleft())
                yield self._pending.popleft(), is_shown
                if self.wanted is not wanted:
                    break

    def _fill(self) -> bool:
        while not self._ended and len(self._pending) < container.REORDER + _BATCH_SIZE:
            try:
                packet = next(self._packets)
            except StopIteration:
                self._ended = True
                break
            self._pending.append(packet)
            self._stamps.append(_END if packet is None or not packet.size else packet.pts)
        return bool(self._pending)

    def _num_needed(self, wanted: np.ndarray | None) -> int:
        """Returns the number of waiting packets up to the last one shown at a requested time."""
        if wanted is None:
            return len(self._stamps)
        end = (wanted[-1] + _TIME_EPS) / self._tick
        last = max(
            (
                i
                for i, timestamp in enumerate(self._stamps)
                if timestamp is None or timestamp <= end
            ),
            default=-1,
        )
        return last + 1 if self._given else max(last + 1, 1)

    def _are_shown(self, wanted: np.ndarray | None) -> list[bool]:
        """Returns whether packets are requested, for those whose neighbors on display are known."""
        count = len(self._pending) - (0 if self._ended else container.REORDER)
        if wanted is None:
            return [True] * count
        timestamps = sorted(
            {timestamp for timestamp in (*self._given, *self._stamps) if timestamp is not None}
        )
        boundaries = np.array([*timestamps, math.inf]) * self._tick
        # the first requested time at or after each frame
        first_wanted = np.searchsorted(wanted, boundaries[:-1] - _TIME_EPS)
        next_wanted = np.append(wanted, np.inf)[first_wanted]
        is_shown = dict(
            zip(timestamps, (next_wanted < boundaries[1:] + _TIME_EPS).tolist(), strict=True)
        )
        return [
            timestamp == _END or is_shown.get(timestamp, True)
            for timestamp in islice(self._stamps, count)
        ]
