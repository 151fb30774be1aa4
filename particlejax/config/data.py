# SPDX-License-Identifier: Apache-2.0
"""Clips, their modalities, augmentations and particles, at one scale or several."""

import dataclasses

from particlejax.config import label_map
from particlejax.config.fields import (
    Spec,
    above,
    at_least,
    between,
    interval,
    named_in,
    number,
    one_of,
    some_of,
)
from particlejax.config.modalities import MODALITIES
from particlejax.core import text
from particlejax.core.errors import UserError

# Plugins may add names; particles/policies.py and data/augment.py hold the implementations.
POLICIES: dict[str, None] = dict.fromkeys(("grid", "tubes", "pyramid", "adaptive", "run_length"))


AUGMENTATIONS: dict[str, None] = {}


@dataclasses.dataclass(frozen=True)
class AugmentSpec(Spec):
    """Random augmentations of training clips, the same for all frames of a clip. Evaluation uses
    none.
    """

    # range of the random resized crop's area, as a fraction of the largest square
    crop_scale: tuple[float, float] = interval((1.0, 1.0), 0.01, 1)
    hflip_prob: float = between(0.0, 0, 1)  # probability of a horizontal flip
    # classes that are never flipped, because a flip changes the class
    no_flip_classes: tuple[str, ...] = ()
    # range of playback speed factors, sampled log-uniformly
    speed_range: tuple[float, float] = interval((1.0, 1.0), 0.01)
    # maximum change of brightness, contrast and saturation (factors 1 +- value); hue changes by a
    # quarter of it
    color_jitter: float = at_least(0.0, 0)
    # number of RandAugment operations (arXiv:1909.13719); 0: none
    randaug_num_ops: int = at_least(0, 0)
    randaug_magnitude: float = between(0.5, 0, 1)  # magnitude of RandAugment operations, in [0, 1]
    # probability of graying out a box of 2 to 33 % of the frame (arXiv:1708.04896)
    random_erasing_prob: float = between(0.0, 0, 1)
    mixup_alpha: float = at_least(0.0, 0)  # alpha of MixUp (arXiv:1710.09412); 0: none
    # alpha of CutMix (arXiv:1905.04899); 0: none. With MixUp, each clip draws one of the two
    cutmix_alpha: float = at_least(0.0, 0)
    audio_gain_db: float = at_least(0.0, 0)  # maximum change of volume, in dB
    # maximum shift of audio against video, in seconds
    audio_shift_seconds: float = at_least(0.0, 0)
    # names of plugin augmentations, applied in this order after the built-in ones
    custom: tuple[str, ...] = some_of((), AUGMENTATIONS, 0)
    # number of time masks and of frequency masks of SpecAugment (arXiv:1904.08779)
    specaugment_num_masks: int = at_least(0, 0)

    def check(self) -> None:
        """Composes the names of classes, as sources do."""
        object.__setattr__(self, "no_flip_classes", tuple(map(text.nfc, self.no_flip_classes)))


@dataclasses.dataclass(frozen=True)
class AudioSpec(Spec):
    """Audio as a log-mel spectrogram, cut into patches."""

    # samples per second; audio is resampled to it and mixed to mono
    sample_rate: int = at_least(16000, 1)
    window_seconds: float = at_least(0.025, 1e-4)  # length of the spectrogram window, in seconds
    hop_seconds: float = at_least(0.010, 1e-4)  # step between spectrogram windows, in seconds
    num_mels: int = at_least(64, 1)  # number of mel bands
    f_min: float = at_least(60.0, 0)  # lowest frequency of the mel bands, in Hz
    f_max: float = at_least(7800.0, 0)  # highest frequency of the mel bands, in Hz
    patch_size: tuple[int, int] = at_least((16, 16), 1)  # patch size: spectrogram frames, mel bands
    mean: float = number(-7.0)  # mean of log(mel power + 1e-6), for normalization
    # standard deviation of log(mel power + 1e-6), for normalization
    std: float = at_least(4.0, 1e-4)
    max_seconds: float = at_least(0.0, 0)  # maximum audio length in seconds; 0: data.clip_seconds


@dataclasses.dataclass(frozen=True)
class TextSpec(Spec):
    """Captions as token ids."""

    tokenizer: str = "bytes"  # 'bytes', or the path of a tokenizer.json of the package `tokenizers`
    max_length: int = at_least(64, 1)  # maximum number of tokens per clip


@dataclasses.dataclass(frozen=True)
class TimeseriesSpec(Spec):
    """Numeric channels of a CSV file beside the clip (clip.mp4, clip.csv) with a column `time` in
    seconds.
    """

    channels: tuple[str, ...] = ()  # CSV columns to read
    # values that are missing (empty, nan, NA): interpolate: from the values around them; missing:
    # no particle where one is missing; refuse: the clip counts as unreadable
    gaps: str = one_of("interpolate", "missing", "refuse")
    sample_rate: float = at_least(30.0, 1e-3)  # values per second; channels are interpolated to it
    patch_length: int = at_least(15, 1)  # number of values per particle
    max_seconds: float = at_least(0.0, 0)  # maximum series length in seconds; 0: data.clip_seconds


@dataclasses.dataclass(frozen=True)
class FeatureSpec(Spec):
    """Features of sub-clips by a frozen network, computed beforehand by job extract_features.

    The network sees the center crop without flips, or the audio, or the caption.
    """

    # out_dir of job extract_features; it records the network, sub-clip length and grid
    folder: str = ""
    max_seconds: float = at_least(0.0, 0)  # maximum span in seconds; 0: data.clip_seconds
    # standardize: per feature over all clips; rms: each particle to unit root mean square
    normalization: str = one_of("standardize", "rms")


@dataclasses.dataclass(frozen=True)
class DataSpec(Spec):
    """The clips, and how frames are sampled from them.

    A clip shorter than the sampled span repeats its last frame; its audio and series end early.
    MP4, Matroska and MPEG-TS are decoded only where needed. Other containers are decoded from the
    start, so clips late in a long video need a larger `decode_timeout_seconds` or a conversion to
    MP4. With `ram_cache_gib` 0, crops of 128 pixels and more are cropped and resized from the
    original frames in one pass.
    """

    # data source: toybox | folder:PATH | tfds:NAME | mix:WEIGHT*SOURCE,WEIGHT*SOURCE
    source: str = "toybox"
    split: str = "train"  # split of the source to train on
    # modalities to load: vision, audio, text, timeseries, video_features, audio_features,
    # text_features
    modalities: tuple[str, ...] = some_of(("vision",), MODALITIES)
    # uniform: evenly over `clip_seconds`; dense: every `frame_stride`-th frame; segment: one frame
    # per segment
    frame_sampling: str = one_of("uniform", "dense", "segment")
    # range of the frame stride for dense sampling, drawn per clip
    frame_stride: tuple[int, int] = interval((2, 2), 1)
    # classes to learn, after `label_map`; clips of other classes are left out; (): all
    classes: tuple[str, ...] = ()
    # pairs (from, to) of labels to rename or merge, or a CSV file with the columns `from,to`, which
    # is read once: config.json keeps its pairs
    label_map: tuple = ()
    # fraction of training clips to use; the subset does not depend on the seed
    train_fraction: float = between(1.0, 0, 1, open_at="least")
    shots: int = at_least(0, 0)  # labeled training clips per class, drawn by the seed; 0: all
    labelled_csv: str = ""  # CSV file with a column `path` of the labeled clips; '': see `shots`
    # fraction of training clips drawn from the unlabeled clips; 0: none
    unlabelled_fraction: float = between(0.0, 0, 1)
    # directory for rendered toybox clips and TFDS data sets
    cache_dir: str = "~/.cache/particlejax"
    num_frames: int = at_least(16, 1)  # number of frames per clip
    image_size: int = at_least(64, 1)  # height and width of frames, in pixels
    # span of the sampled frames, in seconds; 0: the whole clip
    clip_seconds: float = at_least(0.0, 0)
    # short side in pixels of small or cached frames, before cropping; 0: `image_size`
    decode_short_side: int = at_least(0, 0)
    augment: AugmentSpec = AugmentSpec()
    audio: AudioSpec = AudioSpec()
    text: TextSpec = TextSpec()
    timeseries: TimeseriesSpec = TimeseriesSpec()
    # features of a first frozen network, such as a video network
    video_features: FeatureSpec = FeatureSpec()
    # features of a second frozen network, such as an audio network
    audio_features: FeatureSpec = FeatureSpec()
    # features of a third frozen network, such as a text network
    text_features: FeatureSpec = FeatureSpec()
    image_mean: float = number(0.45)  # mean of pixel values in [0, 1], for normalization
    # standard deviation of pixel values in [0, 1], for normalization
    image_std: float = at_least(0.225, 1e-4)
    # factor of each particle's mean over time; below 1, motion is emphasized
    temporal_mean_scale: float = between(1.0, 0, 1)
    clips_per_row: int = at_least(1, 1)  # number of largest-scale clips that fit in a packed row
    max_unreadable: int = at_least(100, 0)  # number of unreadable clips after which the run stops
    # fraction of unreadable clips, of 20 or more, above which the run stops
    max_unreadable_fraction: float = between(0.5, 0, 1)
    # GiB of memory per worker for a cache of decoded clips; 0: no cache
    ram_cache_gib: float = at_least(0.0, 0)
    # seconds after which decoding a clip fails; 0: no limit
    decode_timeout_seconds: float = at_least(60.0, 0)
    num_threads: int = at_least(2, 1)  # decoder threads per worker
    # decoder processes; 0: threads of the main process, which a crash of a native decoder ends. A
    # crashed process names its clip and is started again
    num_workers: int = at_least(0, 0)

    def check(self) -> None:
        """Reads the label map. Raises UserError if it is not one."""
        object.__setattr__(self, "classes", tuple(map(text.nfc, self.classes)))
        object.__setattr__(self, "label_map", label_map.pairs(self.label_map))


@dataclasses.dataclass(frozen=True)
class ParticleSpec(Spec):
    """How clips are cut into particles."""

    policy: str = named_in("grid", POLICIES)  # particle policy (particles/policies.py)
    # size of the smallest particle: frames, rows, columns
    patch_size: tuple[int, int, int] = at_least((2, 16, 16), 1)
    # size ratio of consecutive pyramid levels: frames, rows, columns
    level_factor: tuple[int, int, int] = at_least((2, 2, 2), 1)
    # number of pyramid levels, or of adaptive levels per split axis
    num_levels: int = at_least(3, 1)
    # axes that adaptive particles split: spacetime (both at once), time, space
    split_axes: tuple[str, ...] = some_of(("time", "space"), ("spacetime", "time", "space"))
    # criterion of adaptive splits (particles/adaptive.py)
    split_criterion: str = one_of("squared_error", "absolute_error", "motion")
    # mean absolute difference, in [0, 255], that ends a run; used if `budget` is 0
    run_threshold: float = at_least(0.0, 0)
    # tuples (shape, stride) or (shape, stride, offset) of three numbers each, for policy tubes
    tubes: tuple = ()
    # maximum number of particles per clip: filled by adaptive and runs, else a random subset; 0:
    # all
    budget: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class ScaleSpec(Spec):
    """Sampling and particle settings of one scale; 0, '' and () keep the stage's settings."""

    num_frames: int = at_least(0, 0)  # number of frames per clip
    image_size: int = at_least(0, 0)  # height and width of frames, in pixels
    # span of the frames in seconds; with num_frames, it sets the playback speed
    clip_seconds: float = at_least(0.0, 0)
    frame_stride: int = at_least(0, 0)  # frame stride, if data.frame_sampling is dense
    policy: str = ""  # particles.policy of this scale
    num_levels: int = at_least(0, 0)  # particles.num_levels of this scale
    split_axes: tuple[str, ...] = ()  # particles.split_axes of this scale
    budget: int = at_least(0, 0)  # particles.budget of this scale
    tubes: tuple = ()  # particles.tubes of this scale
    # relative share of clips (mixture), of training (progressive) or of a cycle (cycles)
    weight: float = above(1.0, 0)

    def applied(self, data: DataSpec, particles: ParticleSpec) -> tuple[DataSpec, ParticleSpec]:
        """Returns data and particles with the settings of this scale."""
        changed = {
            name: getattr(self, name)
            for name in ("num_frames", "image_size", "clip_seconds")
            if getattr(self, name)
        }
        if self.frame_stride:
            changed["frame_stride"] = (self.frame_stride, self.frame_stride)
        cut = {
            name: getattr(self, name)
            for name in ("policy", "num_levels", "split_axes", "budget", "tubes")
            if getattr(self, name)
        }
        return dataclasses.replace(data, **changed), dataclasses.replace(particles, **cut)


@dataclasses.dataclass(frozen=True)
class ScaleScheduleSpec(Spec):
    """The scales of a stage over time. Rows keep their shape, so a stage compiles once."""

    # fixed: one scale; mixture: random per clip; progressive: in order; cycles: in order,
    # repeatedly
    kind: str = one_of("fixed", "mixture", "progressive", "cycles")
    scales: tuple[ScaleSpec, ...] = ()  # scales of the schedule; () for kind fixed
    # number of cycles for kind cycles: Multigrid's long cycle (arXiv:1912.00998)
    num_cycles: int = at_least(1, 1)
    # fraction of training, at the end of kind cycles, that uses the last scale
    final_fraction: float = between(0.0, 0, 1, open_at="most")
    # image-size factors of consecutive steps for kind cycles: Multigrid's short cycle
    short_cycle_factors: tuple[float, ...] = above((), 0)

    def check(self) -> None:
        """Raises UserError for scales or settings that the kind does not use."""
        if (self.kind == "fixed") == bool(self.scales):
            remedy = "set another kind" if self.scales else "add scales, or set kind to 'fixed'"
            raise UserError(
                f"ScaleScheduleSpec.kind is {self.kind!r} with {len(self.scales)} scales: {remedy}."
            )
        if self.kind != "cycles" and (
            self.num_cycles != 1 or self.final_fraction or self.short_cycle_factors
        ):
            raise UserError(
                "ScaleScheduleSpec.num_cycles, final_fraction and short_cycle_factors require kind "
                f"'cycles', but kind is {self.kind!r}: set kind to 'cycles', or remove them."
            )
