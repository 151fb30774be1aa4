# SPDX-License-Identifier: Apache-2.0
"""The scale of each training clip, and how many slots of a row it takes."""

import bisect
import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from particlejax.config.data import DataSpec, ParticleSpec, ScaleScheduleSpec, ScaleSpec
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
class RowShape:
    """The fixed shape of a row: slots per modality, and the maximum number of clips."""

    slots: Mapping[str, packing.SlotSpec]
    max_clips: int


@dataclasses.dataclass(frozen=True)
class ScaleSchedule:
    """A ScaleScheduleSpec applied to the data and particles of a stage."""

    spec: ScaleScheduleSpec
    data: DataSpec
    particles: ParticleSpec

    @functools.cached_property
    def scales(self) -> tuple[Scale, ...]:
        """All possible scales; those of a short cycle are consecutive per scale of the spec."""
        base_scales = self.spec.scales or (ScaleSpec(),)
        return tuple(
            self._scale(base_scale, factor)
            for base_scale in base_scales
            for factor in self.spec.short_cycle_factors or (1.0,)
        )

    @functools.cached_property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """Maximum slots of a clip per modality, for each scale."""
        return tuple(
            {name: slot_spec.length for name, slot_spec in clip_slots(scale).items()}
            for scale in self.scales
        )

    @functools.cached_property
    def row(self) -> RowShape:
        """Room for `clips_per_row` clips of the largest scale, or as many smaller ones as fit."""
        row_slots = {
            name: max(size[name] for size in self.sizes) * self.data.clips_per_row
            for name in self.sizes[0]
        }
        max_clips = max(
            min(row_slots[name] // n for name, n in size.items() if n) for size in self.sizes
        )
        return RowShape(
            {
                name: slot_spec._replace(length=row_slots[name])
                for name, slot_spec in clip_slots(self.scales[0]).items()
            },
            max_clips,
        )

    def scale_index(self, progress: float, batch: int, draw: float) -> int:
        """Returns the scale index of a clip, from training progress in [0, 1), its batch, and its
        random number in [0, 1).
        """
        cycle_length = len(self.spec.short_cycle_factors) or 1
        return self._base_scale_index(progress, draw) * cycle_length + batch % cycle_length

    def possible_scales(self, progress: float, batch: int) -> tuple[int, ...]:
        """Returns the scale indices that `scale_index` may return now."""
        draws = self._cumulative_shares[:-1] if self.spec.kind == "mixture" else (0.0,)
        return tuple(self.scale_index(progress, batch, draw) for draw in draws)

    @functools.cached_property
    def _cumulative_shares(self) -> tuple[float, ...]:
        shares = np.array([scale.weight for scale in self.spec.scales or (ScaleSpec(),)])
        return (0.0, *np.cumsum(shares / shares.sum()))

    def _base_scale_index(self, progress: float, draw: float) -> int:
        spec, last = self.spec, len(self._cumulative_shares) - 2
        if spec.kind == "mixture":
            return self._index_at(draw)
        if spec.kind == "cycles":
            moving_fraction = 1 - spec.final_fraction
            return (
                last
                if progress >= moving_fraction
                else self._index_at(progress / moving_fraction * spec.num_cycles % 1)
            )
        return self._index_at(progress) if spec.kind == "progressive" else 0

    def _index_at(self, position: float) -> int:
        # tolerance for rounding errors
        return min(
            bisect.bisect_right(self._cumulative_shares, position + 1e-9) - 1,
            len(self._cumulative_shares) - 2,
        )

    def _scale(self, spec: ScaleSpec, factor: float) -> Scale:
        scale = Scale(*spec.applied(self.data, self.particles))
        if factor == 1:
            return scale
        multiple = policies.required_multiple(scale.particles)[1]
        size = max(multiple, round(scale.data.image_size * factor / multiple) * multiple)
        return scale._replace(data=dataclasses.replace(scale.data, image_size=size))


FIXED_SCHEDULE = ScaleScheduleSpec()


def clip_slots(scale: Scale) -> dict[str, packing.SlotSpec]:
    """Returns the slots of one clip per modality. Raises UserError for sizes that do not fit."""
    for name in scale.data.modalities:
        if name not in MODALITIES:
            raise UserError(
                f"config.data.modalities has {name!r}: choose from {', '.join(MODALITIES)}."
            )
    return {
        name: _SLOT_FUNCTIONS[name](scale.data, scale.particles) for name in scale.data.modalities
    }


def _vision_slots(data: DataSpec, spec: ParticleSpec) -> packing.SlotSpec:
    size = (data.num_frames, data.image_size, data.image_size)
    try:
        policies.check(size, spec)
    except ValueError as error:
        raise UserError(str(error)) from error
    return packing.SlotSpec(
        policies.particle_count(size, spec), int(np.prod(spec.patch_size)) * _CHANNELS, "uint8"
    )


def _audio_slots(data: DataSpec, spec: ParticleSpec) -> packing.SlotSpec:
    del spec
    mels, (spectra, bands) = data.audio.num_mels, data.audio.patch_size
    if mels % bands:
        raise UserError(
            f"config.data.audio.num_mels={mels} is not a multiple of patch_size[1]={bands}: "
            "change one of them."
        )
    num_patches = audio.num_spectra(_max_seconds(data, clips.AUDIO), data.audio) // spectra
    return packing.SlotSpec(max(1, num_patches) * (mels // bands), spectra * bands)


def _series_slots(data: DataSpec, spec: ParticleSpec) -> packing.SlotSpec:
    del spec
    if not data.timeseries.channels:
        raise UserError(
            "config.data.timeseries.channels is empty: set it to the CSV columns to read."
        )
    num_patches = (
        round(_max_seconds(data, clips.TIMESERIES) * data.timeseries.sample_rate)
        // data.timeseries.patch_length
    )
    return packing.SlotSpec(
        max(1, num_patches), data.timeseries.patch_length * len(data.timeseries.channels)
    )


def _feature_slots(modality: str, data: DataSpec, spec: ParticleSpec) -> packing.SlotSpec:
    del spec
    if not clips.needs_decoding(data):
        for key, is_set in (
            ("frame_sampling", data.frame_sampling == "dense"),
            ("augment.mixup_alpha", data.augment.mixup_alpha),
            ("augment.cutmix_alpha", data.augment.cutmix_alpha),
        ):
            if is_set:
                raise UserError(
                    f"config.data.{key} needs frames, but "
                    f"config.data.modalities={data.modalities} decodes none: keep its default, or "
                    "add 'vision'."
                )
    feature_set = feature_reader.open_features(getattr(data, modality), modality)
    return packing.SlotSpec(
        feature_set.max_particles(
            0.0 if feature_set.covers_whole_clip else _max_seconds(data, modality)
        ),
        feature_set.width,
    )


def _text_slots(data: DataSpec, spec: ParticleSpec) -> packing.SlotSpec:
    del spec
    return packing.SlotSpec(data.text.max_length, 1, "int32")


def _max_seconds(data: DataSpec, modality: str) -> float:
    seconds = clips.max_seconds(data, getattr(data, modality).max_seconds)
    if not seconds:
        raise UserError(
            f"config.data.{modality}.max_seconds and config.data.clip_seconds are 0, but the row "
            f"length of {modality} depends on them: set one of them."
        )
    return seconds


_SLOT_FUNCTIONS = {
    clips.VISION: _vision_slots,
    clips.AUDIO: _audio_slots,
    clips.TEXT: _text_slots,
    clips.TIMESERIES: _series_slots,
    **{name: functools.partial(_feature_slots, name) for name in clips.FEATURE_MODALITIES},
}
