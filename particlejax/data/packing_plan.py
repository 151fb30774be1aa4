# SPDX-License-Identifier: Apache-2.0
"""Which clip stands in which row of which batch, known before anything is decoded.

A clip's place in the order and its scale say how many slots it takes at most, so packing is a
function of the seed: every worker and every process works out the same plan, and decodes only what
is its own. Best fit, large ones first; what fits into no row of a batch is carried over to the
next, so nothing is dropped.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from particlejax.data.scale_schedule import Schedule

_AHEAD = 1.5  # clips of mixed sizes that are looked at for a batch, in batches
_PATIENCE = 3  # batches that a clip waits at most behind larger ones
_KEPT = 512  # batches that are remembered: readers ahead of each other ask again
_DRAW = 0x5CA1E  # tells the draws of scales from others
_BLOCK = 1024  # of which are made at a time


class Placed(NamedTuple):
    """A clip: its place in the order, its row in the batch, the number of its scale."""

    position: int
    row: int
    scale: int


class Carried(NamedTuple):
    """A clip that waits: its place in the order, the number of its scale, the batch that it was
    drawn for.
    """

    position: int
    scale: int
    batch: int


class Stand(NamedTuple):
    """Where the plan stands before a batch: the next place in the order, and what was carried
    over.
    """

    batch: int
    position: int
    carried: tuple[Carried, ...] = ()

    @classmethod
    def of(cls, saved: list) -> "Stand":
        """What JSON made of a stand."""
        batch, position, carried = saved
        return cls(batch, position, tuple(Carried(*each) for each in carried))


@dataclass
class Plan:
    """The plan of one stage: of `positions` clips or, where that is 0, without end.

    The schedule's progress is a share of `positions` or of `steps`. since: where a plan that goes
    on may begin.
    """

    schedule: Schedule
    rows: int
    seed: int
    steps: int = 0
    positions: int = 0
    since: Stand = Stand(0, 0)
    _stand: Stand = field(init=False)
    _known: dict[int, list[Placed]] = field(init=False, default_factory=dict)
    _stands: dict[int, Stand] = field(init=False, default_factory=dict)
    _lock: Any = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._stand = self.since

    def __getstate__(self) -> dict[str, Any]:  # for Grain's workers: each goes on by itself
        return {
            name: getattr(self, name)
            for name in ("schedule", "rows", "seed", "steps", "positions", "since")
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)

    def batch(self, k: int) -> list[Placed]:
        """The clips of batch k of all processes."""
        if len(self.schedule.scales) == 1:  # rows that are all alike need no search
            clips, row = range(*self._span(k)), self.schedule.row.clips
            return [Placed(position, i // row, 0) for i, position in enumerate(clips)]
        with self._lock:
            if k not in self._known:
                self._go(k + 1)
            return self._known[k]

    def stand(self, k: int) -> Stand:
        """Where the plan stands before batch k."""
        if len(self.schedule.scales) == 1:
            return Stand(k, self._span(k)[0])
        with self._lock:
            if k not in self._stands and k != self._stand.batch:
                self._go(k)
            return self._stands.get(k, self._stand)

    def seen(self, k: int) -> int:
        """How many clips the batches before k hold."""
        stand = self.stand(k)
        return stand.position - len(stand.carried)

    def batches(self) -> int:
        """How many batches hold all of `positions`."""
        if len(self.schedule.scales) == 1:
            return -(-self.positions // (self.rows * self.schedule.row.clips))
        k = 0
        while self.seen(k) < self.positions:
            k += 1
        return k

    def _span(self, k: int) -> tuple[int, int]:
        number, most = self.rows * self.schedule.row.clips, self.positions or np.inf
        return int(min(k * number, most)), int(min((k + 1) * number, most))

    def _go(self, k: int) -> None:
        """On to batch k; back to where the plan began, where what is asked for was forgotten."""
        if k < self._stand.batch or k - 1 not in self._known and k == self._stand.batch:
            self._stand, self._known, self._stands = (
                self.since if self.since.batch < k else Stand(0, 0),
                {},
                {},
            )
        while self._stand.batch < k:
            number = self._stand.batch
            self._stands[number] = self._stand
            self._known[number], self._stand = self._fill(self._stand)
            self._known.pop(number - _KEPT, None)
            self._stands.pop(number - _KEPT, None)

    def _fill(self, stand: Stand) -> tuple[list[Placed], Stand]:
        waiting, position = self._draw(stand)
        row, wanted = self.schedule.row, self._wanted
        free = np.array([[each.length for each in row.slots.values()]] * self.rows)
        room = np.full(self.rows, row.clips)
        placed, left = [], []
        # Who waited long comes first, so that nobody waits for ever; then the large ones, as the
        # small ones fill gaps.
        for each in sorted(
            waiting,
            key=lambda each: (each.batch + _PATIENCE > stand.batch, -self._share[each.scale]),
        ):
            fits = (room > 0) & (free >= wanted[each.scale]).all(axis=1)
            if fits.any():
                best = int(np.where(fits, free.sum(axis=1), np.iinfo(np.int64).max).argmin())
                free[best] -= wanted[each.scale]
                room[best] -= 1
                placed.append(Placed(each.position, best, each.scale))
            else:
                left.append(each)
        return sorted(placed), Stand(stand.batch + 1, position, tuple(sorted(left)))

    def _draw(self, stand: Stand) -> tuple[list[Carried], int]:
        """What may stand in a batch: what was carried over, and clips until there is more than it
        holds.
        """
        waiting, position = list(stand.carried), stand.position
        held = sum(self._share[each.scale] for each in waiting)
        now = self.schedule.now(self._progress(stand.batch, position), stand.batch)
        enough = (
            self.rows * (_AHEAD if len({self._share[scale] for scale in now}) > 1 else 1.0) - 1e-9
        )
        while held < enough and not 0 < self.positions <= position:
            scale = self.schedule.at(
                self._progress(stand.batch, position), stand.batch, self._chance(position)
            )
            waiting.append(Carried(position, scale, stand.batch))
            held += self._share[scale]
            position += 1
        return waiting, position

    @cached_property
    def _wanted(self) -> np.ndarray:
        """Slots of each scale and modality."""
        return np.array(
            [[size[name] for name in self.schedule.row.slots] for size in self.schedule.sizes]
        )

    @cached_property
    def _share(self) -> list[float]:
        """Of each scale, how much of a row a clip takes."""
        row = self.schedule.row
        return [
            max(1 / row.clips, *(size[name] / each.length for name, each in row.slots.items()))
            for size in self.schedule.sizes
        ]

    def _progress(self, batch: int, position: int) -> float:
        return min(
            position / self.positions if self.positions else batch / max(self.steps, 1), 1 - 1e-9
        )

    def _chance(self, position: int) -> float:
        """The clip's own draw, in [0, 1)."""
        block, i = divmod(position, _BLOCK)
        return float(_chances(self.seed, block)[i]) if self.schedule.spec.kind == "mixture" else 0.0


@lru_cache(16)
def _chances(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, block, _DRAW)).random(_BLOCK)
