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

from particlejax.data.scale_schedule import ScaleSchedule

_CANDIDATE_BATCHES = 1.5  # candidate clips of mixed sizes for a batch, in batches
_MAX_WAIT = 3  # batches after which a waiting clip has priority
_MAX_CACHED = 512  # cached batches: readers at different positions ask for them again
_DRAW_SEED = 0x5CA1E  # separates the random stream of scales from others
_DRAW_BLOCK = 1024  # random numbers per block


class PlacedClip(NamedTuple):
    """A clip: its position in the order, its row in the batch, the index of its scale."""

    position: int
    row: int
    scale: int


class Pending(NamedTuple):
    """A waiting clip: its position in the order, the index of its scale, the batch it was drawn
    for.
    """

    position: int
    scale: int
    batch: int


class PlanState(NamedTuple):
    """The plan's state before a batch: the next position in the order, and the waiting clips."""

    batch: int
    position: int
    pending: tuple[Pending, ...] = ()

    @classmethod
    def from_json(cls, saved: list) -> "PlanState":
        """Restores a state from JSON."""
        batch, position, pending = saved
        return cls(batch, position, tuple(Pending(*fields) for fields in pending))


@dataclass
class Plan:
    """The plan of one stage: of `positions` clips, or endless if that is 0.

    The schedule's progress is a fraction of `positions` or of `steps`. start_state: the state to
    resume from.
    """

    schedule: ScaleSchedule
    num_rows: int
    seed: int
    steps: int = 0
    positions: int = 0
    start_state: PlanState = PlanState(0, 0)
    _state: PlanState = field(init=False)
    _batches: dict[int, list[PlacedClip]] = field(init=False, default_factory=dict)
    _states: dict[int, PlanState] = field(init=False, default_factory=dict)
    _lock: Any = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._state = self.start_state

    def __getstate__(self) -> dict[str, Any]:  # for Grain's workers, each with its own plan
        return {
            name: getattr(self, name)
            for name in ("schedule", "num_rows", "seed", "steps", "positions", "start_state")
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)

    def batch(self, k: int) -> list[PlacedClip]:
        """Returns the clips of batch k of all processes."""
        if len(self.schedule.scales) == 1:  # equal clips need no search
            positions, clips_per_row = range(*self._span(k)), self.schedule.row.max_clips
            return [
                PlacedClip(position, i // clips_per_row, 0) for i, position in enumerate(positions)
            ]
        with self._lock:
            if k not in self._batches:
                self._advance_to(k + 1)
            return self._batches[k]

    def data_state(self, k: int) -> PlanState:
        """Returns the state before batch k."""
        if len(self.schedule.scales) == 1:
            return PlanState(k, self._span(k)[0])
        with self._lock:
            if k not in self._states and k != self._state.batch:
                self._advance_to(k)
            return self._states.get(k, self._state)

    def clips_before(self, k: int) -> int:
        """Returns the number of clips in the batches before k."""
        state = self.data_state(k)
        return state.position - len(state.pending)

    def num_batches(self) -> int:
        """Returns the number of batches that hold all `positions`."""
        if len(self.schedule.scales) == 1:
            return -(-self.positions // (self.num_rows * self.schedule.row.max_clips))
        k = 0
        while self.clips_before(k) < self.positions:
            k += 1
        return k

    def _span(self, k: int) -> tuple[int, int]:
        clips_per_batch, total = (
            self.num_rows * self.schedule.row.max_clips,
            self.positions or np.inf,
        )
        return int(min(k * clips_per_batch, total)), int(min((k + 1) * clips_per_batch, total))

    def _advance_to(self, k: int) -> None:
        """Advances to batch k; restarts if batch k is no longer cached."""
        if k < self._state.batch or k - 1 not in self._batches and k == self._state.batch:
            self._state, self._batches, self._states = (
                self.start_state if self.start_state.batch < k else PlanState(0, 0),
                {},
                {},
            )
        while self._state.batch < k:
            batch = self._state.batch
            self._states[batch] = self._state
            self._batches[batch], self._state = self._fill_batch(self._state)
            self._batches.pop(batch - _MAX_CACHED, None)
            self._states.pop(batch - _MAX_CACHED, None)

    def _fill_batch(self, state: PlanState) -> tuple[list[PlacedClip], PlanState]:
        waiting, position = self._draw_clips(state)
        row, slots_by_scale = self.schedule.row, self._slots_by_scale
        free_slots = np.array(
            [[slot_spec.length for slot_spec in row.slots.values()]] * self.num_rows
        )
        free_clips = np.full(self.num_rows, row.max_clips)
        placed, carried_over = [], []
        # Clips that waited long come first, so that none starves; then large ones, because small
        # ones fill gaps.
        for clip in sorted(
            waiting,
            key=lambda clip: (
                clip.batch + _MAX_WAIT > state.batch,
                -self._row_fractions[clip.scale],
            ),
        ):
            fits = (free_clips > 0) & (free_slots >= slots_by_scale[clip.scale]).all(axis=1)
            if fits.any():
                best_row = int(
                    np.where(fits, free_slots.sum(axis=1), np.iinfo(np.int64).max).argmin()
                )
                free_slots[best_row] -= slots_by_scale[clip.scale]
                free_clips[best_row] -= 1
                placed.append(PlacedClip(clip.position, best_row, clip.scale))
            else:
                carried_over.append(clip)
        return sorted(placed), PlanState(state.batch + 1, position, tuple(sorted(carried_over)))

    def _draw_clips(self, state: PlanState) -> tuple[list[Pending], int]:
        """Returns the candidates of a batch: waiting clips, and new ones until it is more than
        full.
        """
        waiting, position = list(state.pending), state.position
        filled = sum(self._row_fractions[clip.scale] for clip in waiting)
        scales = self.schedule.possible_scales(self._progress(state.batch, position), state.batch)
        target = (
            self.num_rows
            * (
                _CANDIDATE_BATCHES
                if len({self._row_fractions[scale] for scale in scales}) > 1
                else 1.0
            )
            - 1e-9
        )
        while filled < target and not 0 < self.positions <= position:
            scale = self.schedule.scale_index(
                self._progress(state.batch, position), state.batch, self._scale_draw(position)
            )
            waiting.append(Pending(position, scale, state.batch))
            filled += self._row_fractions[scale]
            position += 1
        return waiting, position

    @cached_property
    def _slots_by_scale(self) -> np.ndarray:
        """Slots per scale and modality."""
        return np.array(
            [[size[name] for name in self.schedule.row.slots] for size in self.schedule.sizes]
        )

    @cached_property
    def _row_fractions(self) -> list[float]:
        """Fraction of a row that a clip takes, per scale."""
        row = self.schedule.row
        return [
            max(
                1 / row.max_clips,
                *(size[name] / slot_spec.length for name, slot_spec in row.slots.items()),
            )
            for size in self.schedule.sizes
        ]

    def _progress(self, batch: int, position: int) -> float:
        return min(
            position / self.positions if self.positions else batch / max(self.steps, 1), 1 - 1e-9
        )

    def _scale_draw(self, position: int) -> float:
        """Returns the clip's random number in [0, 1)."""
        block, i = divmod(position, _DRAW_BLOCK)
        return (
            float(_scale_draws(self.seed, block)[i])
            if self.schedule.spec.kind == "mixture"
            else 0.0
        )


@lru_cache(16)
def _scale_draws(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, block, _DRAW_SEED)).random(_DRAW_BLOCK)
