# SPDX-License-Identifier: Apache-2.0
"""The packing plan: which clip goes to which row of which batch, known before decoding.

A clip's position in the order and its scale determine its maximum number of slots, so packing is a
function of the seed: every worker and process computes the same plan and decodes only its own
clips. The plan is best-fit, large clips first; clips that fit into no row are carried over to the
next batch, so none is dropped.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from particlejax.data.scale_schedule import Schedule

_AHEAD = 1.5  # candidate clips of mixed sizes for a batch, in batches
_PATIENCE = 3  # batches after which a waiting clip has priority
_KEPT = 512  # cached batches: readers at different positions ask for them again
_DRAW = 0x5CA1E  # separates the random stream of scales from others
_BLOCK = 1024  # random numbers per block


class Placed(NamedTuple):
    """A clip: its position in the order, its row in the batch, the index of its scale."""

    position: int
    row: int
    scale: int


class Carried(NamedTuple):
    """A waiting clip: its position in the order, the index of its scale, the batch it was drawn
    for.
    """

    position: int
    scale: int
    batch: int


class Stand(NamedTuple):
    """The plan's state before a batch: the next position in the order, and the waiting clips."""

    batch: int
    position: int
    carried: tuple[Carried, ...] = ()

    @classmethod
    def of(cls, saved: list) -> "Stand":
        """Restores a state from JSON."""
        batch, position, carried = saved
        return cls(batch, position, tuple(Carried(*each) for each in carried))


@dataclass
class Plan:
    """The plan of one stage: of `positions` clips, or endless if that is 0.

    The schedule's progress is a fraction of `positions` or of `steps`. since: the state to resume
    from.
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

    def __getstate__(self) -> dict[str, Any]:  # for Grain's workers, each with its own plan
        return {
            name: getattr(self, name)
            for name in ("schedule", "rows", "seed", "steps", "positions", "since")
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)

    def batch(self, k: int) -> list[Placed]:
        """Returns the clips of batch k of all processes."""
        if len(self.schedule.scales) == 1:  # equal clips need no search
            clips, row = range(*self._span(k)), self.schedule.row.clips
            return [Placed(position, i // row, 0) for i, position in enumerate(clips)]
        with self._lock:
            if k not in self._known:
                self._go(k + 1)
            return self._known[k]

    def stand(self, k: int) -> Stand:
        """Returns the state before batch k."""
        if len(self.schedule.scales) == 1:
            return Stand(k, self._span(k)[0])
        with self._lock:
            if k not in self._stands and k != self._stand.batch:
                self._go(k)
            return self._stands.get(k, self._stand)

    def seen(self, k: int) -> int:
        """Returns the number of clips in the batches before k."""
        stand = self.stand(k)
        return stand.position - len(stand.carried)

    def batches(self) -> int:
        """Returns the number of batches that hold all `positions`."""
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
        """Advances to batch k; restarts if batch k is no longer cached."""
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
        # Clips that waited long come first, so that none starves; then large ones, because small
        # ones fill gaps.
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
        """Returns the candidates of a batch: waiting clips, and new ones until it is more than
        full.
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
        """Slots per scale and modality."""
        return np.array(
            [[size[name] for name in self.schedule.row.slots] for size in self.schedule.sizes]
        )

    @cached_property
    def _share(self) -> list[float]:
        """Fraction of a row that a clip takes, per scale."""
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
        """Returns the clip's random number in [0, 1)."""
        block, i = divmod(position, _BLOCK)
        return float(_chances(self.seed, block)[i]) if self.schedule.spec.kind == "mixture" else 0.0


@lru_cache(16)
def _chances(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, block, _DRAW)).random(_BLOCK)
