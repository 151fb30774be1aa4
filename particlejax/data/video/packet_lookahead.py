# SPDX-License-Identifier: Apache-2.0
"""Packet lookahead: marks packets whose frames are requested, and stops after the last of them."""

import math
from collections import deque
from collections.abc import Iterator
from itertools import islice

import av
import numpy as np

from particlejax.data.video import container

_TOGETHER = 64  # packets per batch: marking is as slow as converting a small frame
_END = 2**62  # timestamp of the empty packet that ends a stream
_HAIR = 1e-6  # tolerance in seconds between a requested time and a frame's


class Ahead:
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
        self._waiting: deque[av.Packet | None] = deque()
        self._stamps: deque[int | None] = deque()  # of waiting packets
        # of yielded packets: some are shown after a waiting one
        self._past: deque[int | None] = deque(maxlen=container.REORDER)
        self._ended = False

    def __iter__(self) -> Iterator[tuple[av.Packet | None, bool]]:
        while self._fill():
            wanted = self.wanted
            needed = self._needed(wanted)
            if not needed:
                yield None, True
                return
            for shown in self._shown(wanted)[:needed]:
                self._past.append(self._stamps.popleft())
                yield self._waiting.popleft(), shown
                if self.wanted is not wanted:
                    break

    def _fill(self) -> bool:
        while not self._ended and len(self._waiting) < container.REORDER + _TOGETHER:
            try:
                packet = next(self._packets)
            except StopIteration:
                self._ended = True
                break
            self._waiting.append(packet)
            self._stamps.append(_END if packet is None or not packet.size else packet.pts)
        return bool(self._waiting)

    def _needed(self, wanted: np.ndarray | None) -> int:
        """Returns the number of waiting packets up to the last one shown at a requested time."""
        if wanted is None:
            return len(self._stamps)
        end = (wanted[-1] + _HAIR) / self._tick
        last = max(
            (i for i, stamp in enumerate(self._stamps) if stamp is None or stamp <= end), default=-1
        )
        return last + 1 if self._past else max(last + 1, 1)

    def _shown(self, wanted: np.ndarray | None) -> list[bool]:
        """Returns whether packets are requested, for those whose neighbors on display are known."""
        count = len(self._waiting) - (0 if self._ended else container.REORDER)
        if wanted is None:
            return [True] * count
        known = sorted({stamp for stamp in (*self._past, *self._stamps) if stamp is not None})
        edges = np.array([*known, math.inf]) * self._tick
        # the first requested time at or after each frame
        first = np.searchsorted(wanted, edges[:-1] - _HAIR)
        until = np.append(wanted, np.inf)[first]
        seen = dict(zip(known, (until < edges[1:] + _HAIR).tolist(), strict=True))
        return [stamp == _END or seen.get(stamp, True) for stamp in islice(self._stamps, count)]
