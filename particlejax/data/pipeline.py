# SPDX-License-Identifier: Apache-2.0
"""Batches by number: batch k is a pure function of (source, spec, seed, k), so where the data
stands is one integer.

Grain reads ahead in threads or processes; resuming, or another number of workers or hosts, changes
nothing of what comes. Legend: B rows, S clips of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import absl.flags
import grain
import numpy as np

from particlejax.config.experiment import DataSpec, ParticleSpec, ScaleScheduleSpec
from particlejax.core.typing import UserError
from particlejax.data import augment, clips
from particlejax.data.modalities import tokenizer
from particlejax.data.packing_plan import Plan, Stand
from particlejax.data.scale_schedule import FIXED, Row, Scale, Schedule
from particlejax.data.sources import Source, parts_of
from particlejax.data.video.decode import Unreadable
from particlejax.particles import packing
from particlejax.particles.types import Batch

_AHEAD = (
    8  # batches that are ready while the first step compiles, when most clips are not in memory yet
)
_CUT_SEED = (
    0x5EED  # the order in which `fraction` draws, the same for every run so that runs compare
)


class Bad(NamedTuple):
    """A clip that could not be decoded."""

    number: int
    name: str
    reason: str


class Loaded(NamedTuple):
    """A batch and the clips that are missing from it."""

    batch: Batch
    bad: tuple[Bad, ...]


@dataclass(frozen=True)
class Batches:
    """Training batches: every epoch holds each clip once, in another order, across all processes.

    Of a mixture each part goes round its own epochs, drawn by weight. An unreadable clip leaves its
    place in the row empty; it is never replaced. MixUp and CutMix take partners from the rows of
    their own process.
    """

    source: Source
    data: DataSpec
    particles: ParticleSpec
    seed: int
    rows: int  # over all processes
    process: int = 0
    processes: int = 1
    scales: ScaleScheduleSpec = FIXED
    steps: int = (
        0  # of the training, which the schedule's progress is a share of; 0: `positions` says
    )
    positions: int = 0  # clips after which the data ends; 0: never
    since: Stand = Stand(0, 0)  # where the plan stood when the training was saved

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, k: int) -> Loaded:
        rows = self.rows // self.processes
        mine = range(self.process * rows, (self.process + 1) * rows)
        scales = self.plan.schedule.scales
        wanted = [
            _Wanted(
                int(self.order[p]),
                np.random.default_rng((self.seed, p)),
                scales[scale],
                row - mine.start,
            )
            for p, row, scale in self.plan.batch(k)
            if row in mine
        ]
        return _load(self.source, wanted, self.plan.schedule.row, rows)

    @cached_property
    def plan(self) -> Plan:
        """Which clips stand where."""
        return Plan(
            Schedule(self.scales, self.data, self.particles),
            self.rows,
            self.seed,
            self.steps,
            self.positions,
            self.since,
        )

    def clips(self, k: int) -> list[int]:
        """Which clips batch k holds on all processes."""
        return [int(self.order[placed.position]) for placed in self.plan.batch(k)]

    @cached_property
    def order(self) -> grain.MapDataset:
        """Which clip stands at each position, for ever."""
        parts, seed = parts_of(self.source), self.seed % 2**32
        orders = [
            grain.MapDataset.source(first + chosen_clips(count, self.data.train_fraction))
            .seed(seed)
            .shuffle()
            .repeat(None)
            for first, count, _ in parts
        ]
        return (
            orders[0]
            if len(orders) == 1
            else grain.MapDataset.mix(orders, [weight for *_, weight in parts])
        )


@dataclass(frozen=True)
class Views:
    """Every look at every clip once, for measuring: `views` = temporal clips x spatial crops; the
    last batch is padded.

    `data.train_fraction` is for training: what is measured is always the whole split.
    """

    source: Source
    data: DataSpec
    particles: ParticleSpec
    seed: int
    rows: int
    views: tuple[int, int] = (1, 1)
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return -(-self._count() // (self.rows * self.data.clips_per_row))

    def __getitem__(self, k: int) -> Loaded:
        rows = self.rows // self.processes
        first = (k * self.rows + self.process * rows) * self.data.clips_per_row
        places = range(first, min(first + rows * self.data.clips_per_row, self._count()))
        scale = Scale(self.data, self.particles)
        wanted = [
            _Wanted(*self._look(p), scale, (p - first) // self.data.clips_per_row) for p in places
        ]
        return _load(self.source, wanted, row_of(self.data, self.particles), rows)

    def _count(self) -> int:
        return len(self.source) * self.views[0] * self.views[1]

    def _look(self, place: int) -> tuple[int, clips.View]:
        times, crops = self.views
        clip, view = divmod(place, times * crops)
        return clip, clips.View(view // crops, times, view % crops, crops)


def chosen_clips(count: int, fraction: float) -> np.ndarray:
    """Numbers of the clips that `fraction` of `count` leaves, ascending, at least one."""
    if fraction >= 1:
        return np.arange(count)
    drawn = np.random.default_rng(_CUT_SEED).permutation(count)[: max(1, round(count * fraction))]
    return np.sort(drawn)


def row_of(data: DataSpec, spec: ParticleSpec, scales: ScaleScheduleSpec = FIXED) -> Row:
    """The shape of a row. Raises UserError for sizes that do not fit."""
    return Schedule(scales, data, spec).row


def vocabularies(data: DataSpec) -> dict[str, int]:
    """Of the modalities whose payloads are ids, how many there are."""
    return {clips.TEXT: tokenizer.vocabulary(data.text)} if clips.TEXT in data.modalities else {}


def example(row: Row, rows: int) -> Batch:
    """A batch of zeros with the shapes and types of every batch."""
    return packing.pack([], [], row.slots, rows, row.clips)


def read(batches: Batches | Views, start: int, stop: int, data: DataSpec) -> Iterator[Loaded]:
    """Batches start..stop-1 in order, read ahead by `data.num_threads` threads or in
    `data.num_workers` processes.
    """
    numbers = grain.MapDataset.source(_Slice(batches, start, stop))
    options = grain.ReadOptions(
        num_threads=data.num_threads, prefetch_buffer_size=data.num_threads + _AHEAD
    )
    stream = numbers.to_iter_dataset(options)
    if data.num_workers:
        if not absl.flags.FLAGS.is_parsed():
            # Grain's processes read a flag, and a notebook has parsed none
            absl.flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=data.num_workers, per_worker_buffer_size=2)
        )
    iterator = iter(stream)
    # else Grain's workers and shared memory outlive it
    try:
        yield from iterator
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(
            "a process that decodes was killed, by the system where memory was short: give the "
            "same command "
            "again, it continues from the last checkpoint, with fewer config.data.num_workers."
        ) from error
    finally:
        iterator.close()


@dataclass(frozen=True)
class _Slice:
    batches: Batches | Views
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Loaded:
        return self.batches[self.start + i]


class _Wanted(NamedTuple):
    number: int
    look: clips.Look
    scale: Scale
    row: int


class _Read(NamedTuple):
    wanted: _Wanted
    clip: clips.Clip
    label: int


def _load(source: Source, wanted: list[_Wanted], row: Row, rows: int) -> Loaded:
    read, bad = [], []
    for each in wanted:
        record, data = source[each.number], each.scale.data
        may_flip = (
            record.label < 0 or source.classes[record.label] not in data.augment.no_flip_classes
        )
        try:
            read.append(_Read(each, clips.load(record, data, each.look, may_flip), record.label))
        except Unreadable as error:
            bad.append(Bad(each.number, record.name, error.reason))
    packed = [_packed(read, i) for i in range(len(read))]
    return Loaded(
        packing.pack(packed, [each.wanted.row for each in read], row.slots, rows, row.clips),
        tuple(bad),
    )


def _packed(read: list[_Read], i: int) -> packing.Clip:
    """Clip i with its particles, the next one of its size mixed into its frames where the spec says
    so.
    """
    (number, look, (data, spec), _), clip, label = read[i]
    rng = (
        look
        if isinstance(look, np.random.Generator)
        else np.random.default_rng((_CUT_SEED, number))
    )
    share, other = 1.0, -1
    if isinstance(look, np.random.Generator) and (
        data.augment.mixup_alpha or data.augment.cutmix_alpha
    ):
        others = (read[(i + step) % len(read)] for step in range(1, len(read) + 1))
        partner = next(each for each in others if each.clip.frames.shape == clip.frames.shape)
        frames, share = augment.mix(clip.frames, partner.clip.frames, data.augment, rng)
        clip, other = replace(clip, frames=frames), partner.label
    return packing.Clip(clips.particles_of(clip, data, spec, rng), label, number, share, other)
