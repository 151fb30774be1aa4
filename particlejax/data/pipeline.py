# SPDX-License-Identifier: Apache-2.0
"""Batches by index: batch k is a pure function of (source, spec, seed, k), so the data position is
one integer.

Grain prefetches in threads or processes; resuming, or a different number of workers or hosts,
yields identical batches. A clip that ends its process is left out like any unreadable one. Legend:
B rows, S clips of a row.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import grain
import numpy as np

from particlejax.config.data import DataSpec, ParticleSpec, ScaleScheduleSpec
from particlejax.core.typing import UserError
from particlejax.data import augment, clips, worker_crashes
from particlejax.data.frame_cache import FrameCache
from particlejax.data.modalities import tokenizer
from particlejax.data.packing_plan import Plan, PlanState
from particlejax.data.scale_schedule import FIXED_SCHEDULE, RowShape, Scale, ScaleSchedule
from particlejax.data.sources import Record, Source, parts_of
from particlejax.data.video.decode import Unreadable
from particlejax.data.worker_crashes import Notes, Suspect
from particlejax.particles import packing
from particlejax.particles.types import Batch

_MAX_UNEXPLAINED = 3  # crashes of workers that no clip explains, before the run stops
_MIN_TRIED = 20  # clips to try before the fraction of unreadable ones is judged
_PREFETCH = 8  # prefetched batches; they are loaded while the first step compiles
_SUBSET_SEED = (
    0x5EED  # seed of the `train_fraction` subset, the same for all runs so that they compare
)


class UnreadableClip(NamedTuple):
    """A clip that cannot be decoded."""

    index: int
    name: str
    reason: str


@dataclass
class Tally:
    """The distinct clips of a source that this process has tried to read so far.

    Whether too many of them are unreadable is judged after `_MIN_TRIED`: exactly once all are
    tried, before that with a margin of three standard deviations.
    """

    num_clips: int  # in the source
    max_fraction: float  # of unreadable clips
    readable: set[int] = field(default_factory=set)
    unreadable: set[int] = field(default_factory=set)

    def add(self, loaded: "LoadedBatch") -> None:
        """Counts the clips of a batch."""
        indices = np.unique(loaded.batch.clip_index)
        self.readable.update(indices[indices >= 0].tolist())
        self.unreadable.update(clip.index for clip in loaded.unreadable)

    @property
    def num_tried(self) -> int:
        """Number of clips so far."""
        return len(self.readable | self.unreadable)

    def is_nothing_readable(self) -> bool:
        """Whether no clip is readable, of all or of enough clips."""
        is_enough = self.num_tried >= min(self.num_clips, _MIN_TRIED)
        return is_enough and not self.readable and bool(self.unreadable)

    def is_over_limit(self) -> bool:
        """Whether more than the maximum fraction is unreadable."""
        tried = self.num_tried
        # three standard deviations of the number of unreadable clips, at most
        margin = 0.0 if tried >= self.num_clips else 1.5 * tried**0.5
        return tried >= _MIN_TRIED and len(self.unreadable) > self.max_fraction * tried + margin


class LoadedBatch(NamedTuple):
    """A batch, the unreadable clips that are missing from it, and the tally of its source, if it
    was read by `read_batches`.
    """

    batch: Batch
    unreadable: tuple[UnreadableClip, ...]
    tally: Tally | None = None


@dataclass(frozen=True)
class TrainBatches:
    """Training batches: every epoch contains each clip once, in a new order, across all processes.

    Each part of a mixture has its own epochs and is drawn by weight. An unreadable clip leaves its
    position in the row empty; it is never replaced. MixUp and CutMix take partners from the rows of
    their own process.
    """

    source: Source
    data: DataSpec
    particles: ParticleSpec
    seed: int
    num_rows: int  # over all processes
    process_index: int = 0
    num_processes: int = 1
    scales: ScaleScheduleSpec = FIXED_SCHEDULE
    steps: int = 0  # training steps, for the schedule's progress; 0: use `positions`
    positions: int = 0  # number of clips after which the data ends; 0: never
    start_state: PlanState = PlanState(0, 0)  # state of the plan to resume from
    cache: FrameCache = field(default_factory=FrameCache, compare=False, repr=False)
    # clips that ended a data worker, by index; they are not read again
    crashed: dict[int, UnreadableClip] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, k: int) -> LoadedBatch:
        return _load_batch(self, k)

    def requests(self, k: int) -> list["_ClipRequest"]:
        """Returns the clips of batch k in this process's rows."""
        num_rows = self.num_rows // self.num_processes
        own_rows = range(self.process_index * num_rows, (self.process_index + 1) * num_rows)
        scales = self.plan.schedule.scales
        return [
            _ClipRequest(
                int(self.order[position]),
                np.random.default_rng((self.seed, position)),
                scales[scale],
                row - own_rows.start,
            )
            for position, row, scale in self.plan.batch(k)
            if row in own_rows
        ]

    @property
    def row(self) -> RowShape:
        """The shape of a row."""
        return self.plan.schedule.row

    @property
    def num_clips(self) -> int:
        """Number of distinct clips."""
        fraction = self.data.train_fraction
        return sum(len(subset_indices(count, fraction)) for _, count, _ in parts_of(self.source))

    @cached_property
    def plan(self) -> Plan:
        """The packing plan."""
        return Plan(
            ScaleSchedule(self.scales, self.data, self.particles),
            self.num_rows,
            self.seed,
            self.steps,
            self.positions,
            self.start_state,
        )

    def clip_indices(self, k: int) -> list[int]:
        """Returns the clips of batch k on all processes."""
        return [int(self.order[placed.position]) for placed in self.plan.batch(k)]

    @cached_property
    def order(self) -> grain.MapDataset:
        """The endless sequence of clip indices."""
        parts, seed = parts_of(self.source), self.seed % 2**32
        orders = [
            grain.MapDataset.source(first + subset_indices(count, self.data.train_fraction))
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
class EvalBatches:
    """Evaluation batches: every view of every clip once; `views` = temporal clips x spatial crops.
    The last batch is padded.

    `data.train_fraction` does not apply: evaluation uses the whole split.
    """

    source: Source
    data: DataSpec
    particles: ParticleSpec
    seed: int
    num_rows: int
    views: tuple[int, int] = (1, 1)
    process_index: int = 0
    num_processes: int = 1
    cache: FrameCache = field(default_factory=FrameCache, compare=False, repr=False)
    # clips that ended a data worker, by index; they are not read again
    crashed: dict[int, UnreadableClip] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return -(-self._num_views() // (self.num_rows * self.data.clips_per_row))

    def __getitem__(self, k: int) -> LoadedBatch:
        return _load_batch(self, k)

    def requests(self, k: int) -> list["_ClipRequest"]:
        """Returns the views of batch k in this process's rows."""
        num_rows = self.num_rows // self.num_processes
        first = (k * self.num_rows + self.process_index * num_rows) * self.data.clips_per_row
        positions = range(first, min(first + num_rows * self.data.clips_per_row, self._num_views()))
        scale = Scale(self.data, self.particles)
        return [
            _ClipRequest(
                *self._view(position), scale, (position - first) // self.data.clips_per_row
            )
            for position in positions
        ]

    @property
    def row(self) -> RowShape:
        """The shape of a row."""
        return row_shape(self.data, self.particles)

    @property
    def num_clips(self) -> int:
        """Number of distinct clips."""
        return len(self.source)

    def _num_views(self) -> int:
        return len(self.source) * self.views[0] * self.views[1]

    def _view(self, position: int) -> tuple[int, clips.View]:
        times, crops = self.views
        clip, view = divmod(position, times * crops)
        return clip, clips.View(view // crops, times, view % crops, crops)


def subset_indices(count: int, fraction: float) -> np.ndarray:
    """Returns the ascending indices of a `fraction` of `count` clips, at least one."""
    if fraction >= 1:
        return np.arange(count)
    indices = np.random.default_rng(_SUBSET_SEED).permutation(count)[
        : max(1, round(count * fraction))
    ]
    return np.sort(indices)


def row_shape(
    data: DataSpec, spec: ParticleSpec, scales: ScaleScheduleSpec = FIXED_SCHEDULE
) -> RowShape:
    """Returns the shape of a row. Raises UserError for sizes that do not fit."""
    return ScaleSchedule(scales, data, spec).row


def vocabularies(data: DataSpec) -> dict[str, int]:
    """Returns the vocabulary size of each modality of token ids."""
    return {clips.TEXT: tokenizer.vocabulary(data.text)} if clips.TEXT in data.modalities else {}


def zero_batch(row: RowShape, num_rows: int) -> Batch:
    """Returns a batch of zeros with the shapes and dtypes of every batch."""
    return packing.pack([], [], row.slots, num_rows, row.max_clips)


def read_batches(
    batches: TrainBatches | EvalBatches, start: int, stop: int, data: DataSpec
) -> Iterator[LoadedBatch]:
    """Yields batches start..stop-1 in order, with their tally, prefetched by `data.num_threads`
    threads or `data.num_workers` processes.

    A clip that ends its worker process is unreadable, as if its decoder had raised: the workers are
    started again, without it. Without worker processes it ends this one. Raises UserError if a
    worker is killed or dies for no clip.
    """
    tally = Tally(batches.num_clips, data.max_unreadable_fraction)
    with closing(_read_batches(batches, start, stop, data)) as stream:
        for loaded in stream:
            tally.add(loaded)
            yield loaded._replace(tally=tally)


def _read_batches(
    batches: TrainBatches | EvalBatches, start: int, stop: int, data: DataSpec
) -> Iterator[LoadedBatch]:
    if not data.num_workers:
        dataset = grain.MapDataset.source(_BatchRange(batches, start, stop))
        yield from _iterate(dataset.to_iter_dataset(_read_options(data)))
        return
    num_unexplained = 0  # crashes since the last batch that no clip explains
    while True:
        with tempfile.TemporaryDirectory() as folder:
            notes = Notes(folder)
            dataset = grain.MapDataset.source(_BatchRange(batches, start, stop, notes))
            stream = worker_crashes.processes(dataset, data.num_workers, _read_options(data))
            try:
                for loaded in _iterate(stream):
                    start, num_unexplained = start + 1, 0
                    yield loaded
                return
            except RuntimeError as error:
                exit_code = worker_crashes.death(error)
                if exit_code is None:
                    raise
                suspects = notes.suspects()
        if not _exclude_crashing(batches, exit_code, suspects):
            num_unexplained += 1
            if num_unexplained > _MAX_UNEXPLAINED:
                raise UserError(
                    f"data workers ended {num_unexplained} times in a row with exit code "
                    f"{exit_code} while they read {_names(batches, suspects)}, which reads well "
                    "alone: check the installation of av and numpy, and the memory of this machine."
                )


def _read_options(data: DataSpec) -> grain.ReadOptions:
    return grain.ReadOptions(
        num_threads=data.num_threads, prefetch_buffer_size=data.num_threads + _PREFETCH
    )


def _iterate(stream: grain.IterDataset) -> Iterator[LoadedBatch]:
    iterator = iter(stream)
    # close it: otherwise Grain's workers and shared memory outlive it
    try:
        yield from iterator
    finally:
        iterator.close()


def _exclude_crashing(
    batches: TrainBatches | EvalBatches, exit_code: int, suspects: list[Suspect]
) -> bool:
    """Adds the clip that ended a worker to `batches.crashed`; returns False if none is found.
    Raises UserError if the worker was killed.
    """
    if worker_crashes.was_killed(exit_code):
        raise UserError(
            f"a data worker was killed while it read {_names(batches, suspects)}, probably because "
            "memory was short: run the same command again with fewer config.data.num_workers; it "
            "resumes from the last checkpoint."
        )
    found = worker_crashes.find_crashing(partial(_load_request, batches), suspects)
    if found is None:
        return False
    suspect, exit_code = found
    index = batches.requests(suspect.batch)[suspect.position].index
    reason = worker_crashes.reason(exit_code)
    batches.crashed[index] = UnreadableClip(index, batches.source[index].name, reason)
    return True


def _names(batches: TrainBatches | EvalBatches, suspects: list[Suspect]) -> str:
    """The names of the clips that were being read."""
    indices = [batches.requests(s.batch)[s.position].index for s in suspects if s.in_work]
    return ", ".join(batches.source[index].name for index in indices) or "no clip"


@dataclass(frozen=True)
class _BatchRange:
    batches: TrainBatches | EvalBatches
    start: int
    stop: int
    notes: Notes | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> LoadedBatch:
        return _load_batch(self.batches, self.start + i, self.notes)


class _ClipRequest(NamedTuple):
    index: int
    view_or_rng: clips.ViewOrRng
    scale: Scale
    row: int


class _LoadedClip(NamedTuple):
    request: _ClipRequest
    clip: clips.Clip
    label: int


def _load_batch(
    batches: TrainBatches | EvalBatches, k: int, notes: Notes | None = None
) -> LoadedBatch:
    loaded, unreadable = [], []
    for position, request in enumerate(batches.requests(k)):
        if request.index in batches.crashed:
            unreadable.append(batches.crashed[request.index])
            continue
        with notes.reading(k, position) if notes else nullcontext():
            record = batches.source[request.index]
            try:
                loaded.append(_load_clip(batches, request, record))
            except Unreadable as error:
                unreadable.append(UnreadableClip(request.index, record.name, error.reason))
    packed = [_to_packed_clip(loaded, i) for i in range(len(loaded))]
    return LoadedBatch(
        packing.pack(
            packed,
            [loaded_clip.request.row for loaded_clip in loaded],
            batches.row.slots,
            batches.num_rows // batches.num_processes,
            batches.row.max_clips,
        ),
        tuple(unreadable),
    )


def _load_request(batches: TrainBatches | EvalBatches, k: int, position: int) -> None:
    """Loads one clip of batch k, for the effects on this process alone."""
    request = batches.requests(k)[position]
    try:
        _load_clip(batches, request, batches.source[request.index])
    except Unreadable:
        pass


def _load_clip(
    batches: TrainBatches | EvalBatches, request: _ClipRequest, record: Record
) -> _LoadedClip:
    data, classes = request.scale.data, batches.source.classes
    may_flip = record.label < 0 or classes[record.label] not in data.augment.no_flip_classes
    clip = clips.load(record, data, request.view_or_rng, may_flip, batches.cache)
    return _LoadedClip(request, clip, record.label)


def _to_packed_clip(loaded: list[_LoadedClip], i: int) -> packing.Clip:
    """Returns clip i as particles, after MixUp or CutMix with the next clip of its size."""
    (index, view_or_rng, (data, spec), _), clip, label = loaded[i]
    rng = (
        view_or_rng
        if isinstance(view_or_rng, np.random.Generator)
        else np.random.default_rng((_SUBSET_SEED, index))
    )
    label_weight, second_label = 1.0, -1
    if isinstance(view_or_rng, np.random.Generator) and (
        data.augment.mixup_alpha or data.augment.cutmix_alpha
    ):
        candidates = (loaded[(i + step) % len(loaded)] for step in range(1, len(loaded) + 1))
        partner = next(
            candidate
            for candidate in candidates
            if candidate.clip.frames.shape == clip.frames.shape
        )
        frames, label_weight = augment.mix(clip.frames, partner.clip.frames, data.augment, rng)
        clip, second_label = replace(clip, frames=frames), partner.label
    return packing.Clip(
        clips.make_particles(clip, data, spec, rng), label, index, label_weight, second_label
    )
