# SPDX-License-Identifier: Apache-2.0
"""One continuous clock for streams whose timestamps restart: recordings written one after the
other, or interrupted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import av
from av.format import Flags

_MAX_BACKWARD = 0.1  # seconds by which decoding times may decrease; FFmpeg's own program allows 0.1
MAX_FORWARD = 10.0  # seconds of a gap that is kept; FFmpeg's own program closes longer ones
_MAX_UNEVEN = 1.0  # seconds by which the streams of a recording may end apart


class _Last(NamedTuple):
    time: float  # decoding time of a stream's last packet, in seconds
    end: float


def may_restart(container: av.container.InputContainer) -> bool:
    """Whether timestamps of this format may restart or jump, such as those of MPEG-TS."""
    return bool(container.format.flags & Flags.ts_discont.value)


class ContinuousClock:
    """Moves the timestamps of packets so that each stream continues where its clock jumps.

    Each jump begins another recording. All streams of a recording move by the same offset, so they
    stay in sync, although they do not reach it at the same packet. Packets must come in the order
    of the file.
    """

    def __init__(self) -> None:
        self._offsets = [0.0]  # seconds to add, by recording
        self._recording: dict[int, int] = {}  # by stream index
        self._last: dict[int, _Last] = {}  # by stream index

    @property
    def num_jumps(self) -> int:
        """Number of jumps so far."""
        return len(self._offsets) - 1

    def packets(
        self, container: av.container.InputContainer, stream: av.stream.Stream
    ) -> Iterator[av.Packet]:
        """Yields the packets of `stream` with continuous timestamps, then an empty one."""
        # pictures and sound, although one of them is wanted: the first of them shows a jump
        streams = (*container.streams.video, *container.streams.audio)
        for packet in container.demux(*streams):
            self._move(packet)
            if packet.stream_index == stream.index:
                yield packet

    def _move(self, packet: av.Packet) -> None:
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None:
            return
        tick, index = float(packet.time_base), packet.stream_index
        recording, last = self._find_recording(index, stamp * tick), self._last.get(index)
        offset = self._offsets[recording]
        time = stamp * tick + offset
        step = packet.duration * tick if packet.duration else last.end - last.time if last else 0.0
        self._recording[index], self._last[index] = recording, _Last(time, time + step)
        ticks = round(offset / tick)
        if ticks:
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks

    def _find_recording(self, index: int, time: float) -> int:
        """Returns the recording of a stream's next packet, which has its own time `time`."""
        last = self._last.get(index)
        if last is None:
            return self.num_jumps
        own = self._recording[index]
        if last.time - _MAX_BACKWARD <= time + self._offsets[own] <= last.end + MAX_FORWARD:
            return own
        for recording in range(own + 1, len(self._offsets)):  # that another stream has reached
            if abs(time + self._offsets[recording] - last.end) <= _MAX_UNEVEN:
                return recording
        self._offsets.append(max(last.end for last in self._last.values()) - time)
        return self.num_jumps
