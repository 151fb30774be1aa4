# SPDX-License-Identifier: Apache-2.0
"""Batches by index: batch k is a pure function of (source, spec, seed, k), so the data position is
one integer.

Grain prefetches in threads or processes; resuming, or a different number of workers or hosts,
yields identical batches. Legend: B rows, S clips of a row.
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

_AHEAD = 8  # prefetched batches; they are loaded while the first step compiles
_CUT_SEED = (
    0x5EED  # seed of the `train_fraction` subset, the same for all runs so that they compare
)


class Bad(NamedTuple):
    """A clip that cannot be decoded."""

    number: int
    name: str
    reason: str


class Loaded(NamedTuple):
    """A batch and the unreadable clips that are missing from it."""

    batch: Batch
    bad: tuple[Bad, ...]


@dataclass(frozen=True)
class Batches:
    """Training batches: every epoch contains each clip once, in a new order, across all processes.

    Each part of a mixture has its own epochs and is drawn by weight. An unreadable clip leaves its
    position in the row empty; it is never replaced. MixUp and CutMix take partners from the rows of
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
    steps: int = 0  # training steps, for the schedule's progress; 0: use `positions`
    positions: int = 0  # number of clips after which the data ends; 0: never
    since: Stand = Stand(0, 0)  # state of the plan to resume from

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
        """The packing plan."""
        return Plan(
            Schedule(self.scales, self.data, self.particles),
            self.rows,
            self.seed,
            self.steps,
            self.positions,
            self.since,
        )

    def clips(self, k: int) -> list[int]:
        """Returns the clips of batch k on all processes."""
        return [int(self.order[placed.position]) for placed in self.plan.batch(k)]

    @cached_property
    def order(self) -> grain.MapDataset:
        """The endless sequence of clip indices."""
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
    """Evaluation batches: every view of every clip once; `views` = temporal clips x spatial crops.
    The last batch is padded.

    `data.train_fraction` does not apply: evaluation uses the whole split.
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
    """Returns the ascending indices of a `fraction` of `count` clips, at least one."""
    if fraction >= 1:
        return np.arange(count)
    drawn = np.random.default_rng(_CUT_SEED).permutation(count)[: max(1, round(count * fraction))]
    return np.sort(drawn)


def row_of(data: DataSpec, spec: ParticleSpec, scales: ScaleScheduleSpec = FIXED) -> Row:
    """Returns the shape of a row. Raises UserError for sizes that do not fit."""
    return Schedule(scales, data, spec).row


def vocabularies(data: DataSpec) -> dict[str, int]:
    """Returns the vocabulary size of each modality of token ids."""
    return {clips.TEXT: tokenizer.vocabulary(data.text)} if clips.TEXT in data.modalities else {}


def example(row: Row, rows: int) -> Batch:
    """Returns a batch of zeros with the shapes and dtypes of every batch."""
    return packing.pack([], [], row.slots, rows, row.clips)


def read(batches: Batches | Views, start: int, stop: int, data: DataSpec) -> Iterator[Loaded]:
    """Yields batches start..stop-1 in order, prefetched by `data.num_threads` threads or
    `data.num_workers` processes.
    """
    numbers = grain.MapDataset.source(_Slice(batches, start, stop))
    options = grain.ReadOptions(
        num_threads=data.num_threads, prefetch_buffer_size=data.num_threads + _AHEAD
    )
    stream = numbers.to_iter_dataset(options)
    if data.num_workers:
        if not absl.flags.FLAGS.is_parsed():
            # Grain's processes read a flag, but a notebook parses none
            absl.flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=data.num_workers, per_worker_buffer_size=2)
        )
    iterator = iter(stream)
    # close it: otherwise Grain's workers and shared memory outlive it
    try:
        yield from iterator
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(
            "a data worker was killed, probably because memory was short: run the same command "
            "again with fewer config.data.num_workers; it resumes from the last checkpoint."
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
    """Returns clip i as particles, after MixUp or CutMix with the next clip of its size."""
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
