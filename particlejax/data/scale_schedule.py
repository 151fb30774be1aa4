# SPDX-License-Identifier: Apache-2.0
"""The scale of each training clip, and how many slots of a row it takes."""

import bisect
import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from particlejax.config.experiment import DataSpec, ParticleSpec, ScaleScheduleSpec, ScaleSpec
from particlejax.config.modalities import MODALITIES
from particlejax.core.typing import UserError
from particlejax.data import clips
from particlejax.data.modalities import audio, feature_reader
from particlejax.particles import packing, policies

_CHANNELS = 3


class Scale(NamedTuple):
    """Sampling and particle settings of a clip."""

    data: DataSpec
    particles: ParticleSpec


@dataclasses.dataclass(frozen=True)
class Row:
    """The fixed shape of a row: slots per modality, and the maximum number of clips."""

    slots: Mapping[str, packing.Slots]
    clips: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A ScaleScheduleSpec applied to the data and particles of a stage."""

    spec: ScaleScheduleSpec
    data: DataSpec
    particles: ParticleSpec

    @functools.cached_property
    def scales(self) -> tuple[Scale, ...]:
        """All possible scales; those of a short cycle are consecutive per scale of the spec."""
        longs = self.spec.scales or (ScaleSpec(),)
        return tuple(
            self._scale(each, factor)
            for each in longs
            for factor in self.spec.short_cycle_factors or (1.0,)
        )

    @functools.cached_property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """Maximum slots of a clip per modality, for each scale."""
        return tuple(
            {name: each.length for name, each in slots(scale).items()} for scale in self.scales
        )

    @functools.cached_property
    def row(self) -> Row:
        """Room for `clips_per_row` clips of the largest scale, or as many smaller ones as fit."""
        most = {
            name: max(size[name] for size in self.sizes) * self.data.clips_per_row
            for name in self.sizes[0]
        }
        room = max(min(most[name] // n for name, n in size.items() if n) for size in self.sizes)
        return Row(
            {
                name: each._replace(length=most[name])
                for name, each in slots(self.scales[0]).items()
            },
            room,
        )

    def at(self, progress: float, batch: int, draw: float) -> int:
        """Returns the scale index of a clip, from training progress in [0, 1), its batch, and its
        random number in [0, 1).
        """
        shorts = len(self.spec.short_cycle_factors) or 1
        return self._long(progress, draw) * shorts + batch % shorts

    def now(self, progress: float, batch: int) -> tuple[int, ...]:
        """Returns the scale indices that `at` may return now."""
        draws = self._edges[:-1] if self.spec.kind == "mixture" else (0.0,)
        return tuple(self.at(progress, batch, draw) for draw in draws)

    @functools.cached_property
    def _edges(self) -> tuple[float, ...]:
        shares = np.array([each.weight for each in self.spec.scales or (ScaleSpec(),)])
        return (0.0, *np.cumsum(shares / shares.sum()))

    def _long(self, progress: float, draw: float) -> int:
        spec, last = self.spec, len(self._edges) - 2
        if spec.kind == "mixture":
            return self._find(draw)
        if spec.kind == "cycles":
            moving = 1 - spec.final_fraction
            return (
                last if progress >= moving else self._find(progress / moving * spec.num_cycles % 1)
            )
        return self._find(progress) if spec.kind == "progressive" else 0

    def _find(self, at: float) -> int:
        # tolerance for rounding errors
        return min(bisect.bisect_right(self._edges, at + 1e-9) - 1, len(self._edges) - 2)

    def _scale(self, spec: ScaleSpec, factor: float) -> Scale:
        scale = Scale(*spec.applied(self.data, self.particles))
        if factor == 1:
            return scale
        step = policies.coarsest(scale.particles)[1]
        size = max(step, round(scale.data.image_size * factor / step) * step)
        return scale._replace(data=dataclasses.replace(scale.data, image_size=size))


FIXED = ScaleScheduleSpec()


def slots(scale: Scale) -> dict[str, packing.Slots]:
    """Returns the slots of one clip per modality. Raises UserError for sizes that do not fit."""
    for name in scale.data.modalities:
        if name not in MODALITIES:
            raise UserError(
                f"config.data.modalities has {name!r}: choose from {', '.join(MODALITIES)}."
            )
    return {name: _SLOTS[name](scale.data, scale.particles) for name in scale.data.modalities}


def _vision_slots(data: DataSpec, spec: ParticleSpec) -> packing.Slots:
    size = (data.num_frames, data.image_size, data.image_size)
    try:
        policies.check(size, spec)
    except ValueError as error:
        raise UserError(str(error)) from error
    return packing.Slots(
        policies.particle_count(size, spec), int(np.prod(spec.patch_size)) * _CHANNELS, "uint8"
    )


def _audio_slots(data: DataSpec, spec: ParticleSpec) -> packing.Slots:
    del spec
    mels, (spectra, bands) = data.audio.num_mels, data.audio.patch_size
    if mels % bands:
        raise UserError(
            f"config.data.audio.num_mels={mels} is not a multiple of patch_size[1]={bands}: "
            "change one of them."
        )
    number = audio.spectra(_seconds(data, clips.AUDIO), data.audio) // spectra
    return packing.Slots(max(1, number) * (mels // bands), spectra * bands)


def _series_slots(data: DataSpec, spec: ParticleSpec) -> packing.Slots:
    del spec
    if not data.timeseries.channels:
        raise UserError(
            "config.data.timeseries.channels is empty: set it to the CSV columns to read."
        )
    number = (
        round(_seconds(data, clips.TIMESERIES) * data.timeseries.sample_rate)
        // data.timeseries.patch_length
    )
    return packing.Slots(
        max(1, number), data.timeseries.patch_length * len(data.timeseries.channels)
    )


def _kept_slots(modality: str, data: DataSpec, spec: ParticleSpec) -> packing.Slots:
    del spec
    if not clips.decodes(data):
        for key, needless in (
            ("frame_sampling", data.frame_sampling == "dense"),
            ("augment.mixup_alpha", data.augment.mixup_alpha),
            ("augment.cutmix_alpha", data.augment.cutmix_alpha),
        ):
            if needless:
                raise UserError(
                    f"config.data.{key} needs frames, but "
                    f"config.data.modalities={data.modalities} decodes none: keep its default, or "
                    "add 'vision'."
                )
    what = feature_reader.opened(getattr(data, modality), modality)
    return packing.Slots(what.most(0.0 if what.whole else _seconds(data, modality)), what.width)


def _text_slots(data: DataSpec, spec: ParticleSpec) -> packing.Slots:
    del spec
    return packing.Slots(data.text.max_length, 1, "int32")


def _seconds(data: DataSpec, modality: str) -> float:
    seconds = clips.longest(data, getattr(data, modality).max_seconds)
    if not seconds:
        raise UserError(
            f"config.data.{modality}.max_seconds and config.data.clip_seconds are 0, but the row "
            f"length of {modality} depends on them: set one of them."
        )
    return seconds


_SLOTS = {
    clips.VISION: _vision_slots,
    clips.AUDIO: _audio_slots,
    clips.TEXT: _text_slots,
    clips.TIMESERIES: _series_slots,
    **{name: functools.partial(_kept_slots, name) for name in clips.FEATURE_MODALITIES},
}
