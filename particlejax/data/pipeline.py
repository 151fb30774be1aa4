# SPDX-License-Identifier: Apache-2.0
"""Batches by number: batch k is a pure function of (source, spec, seed, k), so where the data stands is one integer.

Grain reads ahead in threads or processes; resuming, or another number of workers or hosts, changes nothing of what comes.
Legend: B rows, S clips of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import absl.flags
import grain
import numpy as np

from particlejax.data import audio, augment, clips, words
from particlejax.data.decode import Unreadable
from particlejax.data.sources import Source, parts_of
from particlejax.particles import pack, policies
from particlejax.particles.types import Batch
from particlejax.spec import DataSpec, ParticleSpec
from particlejax.typing import UserError

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

    Of a mixture each part goes round its own epochs, drawn by weight. An unreadable clip leaves its place in the row empty; it is never replaced.
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
        parts, seed = parts_of(self.source), self.seed % 2**32
        orders = [grain.MapDataset.source(first + chosen_clips(count, self.data.fraction)).seed(seed).shuffle().repeat(None)
                  for first, count, _ in parts]
        return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [weight for *_, weight in parts])


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
    for name in data.modalities:
        if name not in clips.MODALITIES:
            raise UserError(f"config.data.modalities names {name!r}: choose of {', '.join(clips.MODALITIES)}.")
    return {name: _SLOTS[name](data, spec) for name in data.modalities}


def vocabularies(data: DataSpec) -> dict[str, int]:
    """Of the modalities whose payloads are ids, how many there are."""
    return {clips.TEXT: words.vocabulary(data.text)} if clips.TEXT in data.modalities else {}


def _vision_slots(data: DataSpec, spec: ParticleSpec) -> pack.Slots:
    size = (data.frames, data.size, data.size)
    try:
        policies.check(size, spec)
    except ValueError as error:
        raise UserError(str(error)) from error
    return pack.Slots(policies.particle_count(size, spec) * data.clips_per_row, int(np.prod(spec.base)) * _CHANNELS,
                      "uint8")


def _audio_slots(data: DataSpec, spec: ParticleSpec) -> pack.Slots:
    del spec
    mels, (spectra, bands) = data.audio.mels, data.audio.patch
    if mels % bands:
        raise UserError(f"config.data.audio.mels={mels} is not a multiple of the {bands} bands of its patch: change "
                        "one of them.")
    number = audio.spectra(_seconds(data, "audio"), data.audio) // spectra
    return pack.Slots(max(1, number) * (mels // bands) * data.clips_per_row, spectra * bands)


def _series_slots(data: DataSpec, spec: ParticleSpec) -> pack.Slots:
    del spec
    if not data.series.channels:
        raise UserError("config.data.series.channels is empty: name the columns of the CSV files that are read.")
    number = round(_seconds(data, "series") * data.series.rate) // data.series.window
    return pack.Slots(max(1, number) * data.clips_per_row, data.series.window * len(data.series.channels))


def _text_slots(data: DataSpec, spec: ParticleSpec) -> pack.Slots:
    del spec
    return pack.Slots(data.text.length * data.clips_per_row, 1, "int32")


def _seconds(data: DataSpec, modality: str) -> float:
    seconds = clips.longest(data, getattr(data, modality).seconds)
    if not seconds:
        raise UserError(f"config.data.{modality}.seconds and config.data.seconds are 0, so nobody knows how much {modality} "
                        "a row must hold: set one of them.")
    return seconds


_SLOTS = {clips.VISION: _vision_slots, clips.AUDIO: _audio_slots, clips.TEXT: _text_slots, clips.SERIES: _series_slots}


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
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError("a process that decodes was killed, by the system where memory was short: give the same command "
                        "again, it continues from the last checkpoint, with fewer config.data.workers.") from error
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
    read, bad = [], []
    for number, look in wanted:
        record = source[number]
        may_flip = record.label < 0 or source.classes[record.label] not in data.augment.directed
        try:
            read.append((clips.load(record, data, look, may_flip), record.label, number, look))
        except Unreadable as error:
            bad.append(Bad(number, record.name, error.reason))
    packed = [_packed(read, i, data, spec) for i in range(len(read))]
    return Loaded(pack.pack(packed, row_slots(data, spec), rows, data.clips_per_row), tuple(bad))


def _packed(read: list, i: int, data: DataSpec, spec: ParticleSpec) -> pack.Clip:
    """Clip i with its particles, the next one mixed into its frames where the spec says so."""
    clip, label, number, look = read[i]
    rng = look if isinstance(look, np.random.Generator) else np.random.default_rng((_CUT_SEED, number))
    share, other = 1.0, -1
    if isinstance(look, np.random.Generator) and (data.augment.mixup or data.augment.cutmix):
        partner = read[(i + 1) % len(read)]
        frames, share = augment.mix(clip.frames, partner[0].frames, data.augment, rng)
        clip, other = replace(clip, frames=frames), partner[1]
    return pack.Clip(clips.particles_of(clip, data, spec, rng), label, number, share, other)
