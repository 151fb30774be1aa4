# SPDX-License-Identifier: Apache-2.0
"""Batches by number: batch k is a pure function of (source, spec, seed, k), so where the data stands is one integer.

Grain reads ahead in threads or processes; resuming, or another number of workers or hosts, changes nothing of what comes.
Legend: B rows, S clips of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import absl.flags
import grain
import numpy as np

from particlejax.data import clips
from particlejax.data.decode import Unreadable
from particlejax.data.sources import Source
from particlejax.particles import pack, policies
from particlejax.particles.types import Batch, Particles
from particlejax.spec import DataSpec, ParticleSpec
from particlejax.typing import UserError

VISION = "vision"
_CHANNELS = 3
_CUT_SEED = 0x5EED  # the order in which `fraction` draws, the same for every run so that runs compare


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
    """Training batches without end: every epoch holds each clip once, in another order, across all processes.

    An unreadable clip leaves its place in the row empty; it is never replaced.
    """

    source: Source
    data: DataSpec
    particles: ParticleSpec
    seed: int
    rows: int  # over all processes
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, k: int) -> Loaded:
        rows = self.rows // self.processes
        first = (k * self.rows + self.process * rows) * self.data.clips_per_row
        order = self._order()
        places = range(first, first + rows * self.data.clips_per_row)
        wanted = [(int(order[p]), np.random.default_rng((self.seed, p))) for p in places]
        return _load(self.source, self.data, self.particles, wanted, rows)

    def clips(self, k: int) -> list[int]:
        """Which clips batch k holds on all processes."""
        order, n = self._order(), self.rows * self.data.clips_per_row
        return [int(order[p]) for p in range(k * n, (k + 1) * n)]

    def _order(self) -> grain.MapDataset:
        chosen = chosen_clips(len(self.source), self.data.fraction)
        return grain.MapDataset.source(chosen).seed(self.seed % 2**32).shuffle().repeat(None)


@dataclass(frozen=True)
class Views:
    """Every look at every clip once, for measuring: `views` = temporal clips x spatial crops; the last batch is padded.

    `data.fraction` is for training: what is measured is always the whole split.
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
        return _load(self.source, self.data, self.particles, [self._look(p) for p in places], rows)

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


def row_slots(data: DataSpec, spec: ParticleSpec) -> dict[str, pack.Slots]:
    """What a row has for each modality. Raises UserError for sizes that do not fit."""
    size = (data.frames, data.size, data.size)
    try:
        policies.check(size, spec)
    except ValueError as error:
        raise UserError(str(error)) from error
    length = policies.particle_count(size, spec) * data.clips_per_row
    return {VISION: pack.Slots(length, int(np.prod(spec.base)) * _CHANNELS)}


def example(data: DataSpec, spec: ParticleSpec, rows: int) -> Batch:
    """A batch of zeros with the shapes and types of every batch."""
    return pack.pack([], row_slots(data, spec), rows, data.clips_per_row)


def read(batches: Batches | Views, start: int, stop: int, data: DataSpec) -> Iterator[Loaded]:
    """Batches start..stop-1 in order, read ahead by `data.threads` threads or in `data.workers` processes."""
    numbers = grain.MapDataset.source(_Slice(batches, start, stop))
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads)
    stream = numbers.to_iter_dataset(options)
    if data.workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # Grain's processes read a flag, and a notebook has parsed none
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2))
    iterator = iter(stream)
    try:
        yield from iterator
    finally:
        iterator.close()  # else Grain's workers and shared memory outlive it


@dataclass(frozen=True)
class _Slice:
    batches: Batches | Views
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Loaded:
        return self.batches[self.start + i]


def _load(source: Source, data: DataSpec, spec: ParticleSpec, wanted: list, rows: int) -> Loaded:
    packed, bad = [], []
    for number, look in wanted:
        record = source[number]
        try:
            frames, times = clips.load(record, data, look)
        except Unreadable as error:
            bad.append(Bad(number, record.name, error.reason))
            continue
        rng = look if isinstance(look, np.random.Generator) else np.random.default_rng((_CUT_SEED, number))
        particles: dict[str, Particles] = {VISION: clips.particles_of(frames, times, data, spec, rng)}
        packed.append(pack.Clip(particles, record.label, number))
    return Loaded(pack.pack(packed, row_slots(data, spec), rows, data.clips_per_row), tuple(bad))
