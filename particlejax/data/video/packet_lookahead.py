# SPDX-License-Identifier: Apache-2.0
"""Packets read ahead of the decoder: which hold a frame that somebody wants to see, and after which
nobody wants any more.
"""

import math
from collections import deque
from collections.abc import Iterator
from itertools import islice

import av
import numpy as np

from particlejax.data.video import container

_TOGETHER = 64  # packets judged at once: a judgement costs as much as a small frame's conversion
_END = 2**62  # the stamp of an empty packet, which ends a stream: after everything
_HAIR = 1e-6  # seconds by which a wanted time may miss a frame's


class Ahead:
    """Packets of one stream in the order of decoding, each with whether a frame of it is on display
    at a wanted time.

    wanted: ascending, seconds on the container's clock; None: every frame. It may be set anew
    between two packets. Once all that is wanted has been given, None follows instead of the rest:
    the decoder shall hand out what it holds.
    """

    def __init__(
        self, packets: Iterator[av.Packet | None], tick: float, wanted: np.ndarray | None
    ) -> None:
        self.wanted = wanted
        self._packets, self._tick = packets, tick
        self._waiting: deque[av.Packet | None] = deque()
        self._stamps: deque[int | None] = deque()  # of those that wait
        # of those given: some are shown after one that waits
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
        """How many of the packets that wait come no later than the last one shown at a wanted time;
        all that follow do.
        """
        if wanted is None:
            return len(self._stamps)
        end = (wanted[-1] + _HAIR) / self._tick
        last = max(
            (i for i, stamp in enumerate(self._stamps) if stamp is None or stamp <= end), default=-1
        )
        return last + 1 if self._past else max(last + 1, 1)

    def _shown(self, wanted: np.ndarray | None) -> list[bool]:
        """Of the packets whose neighbours on display are known, whether they are wanted."""
        count = len(self._waiting) - (0 if self._ended else container.REORDER)
        if wanted is None:
            return [True] * count
        known = sorted({stamp for stamp in (*self._past, *self._stamps) if stamp is not None})
        edges = np.array([*known, math.inf]) * self._tick
        # the first time that is wanted from each frame on
        first = np.searchsorted(wanted, edges[:-1] - _HAIR)
        until = np.append(wanted, np.inf)[first]
        seen = dict(zip(known, (until < edges[1:] + _HAIR).tolist(), strict=True))
        return [stamp == _END or seen.get(stamp, True) for stamp in islice(self._stamps, count)]
