# SPDX-License-Identifier: Apache-2.0
"""The configuration of an experiment: one frozen dataclass per section, which holds all defaults.

An experiment file fills a ConfigDict of these dataclasses (`section`). `Experiment.of` converts it
back and rejects unknown keys with the closest match.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config import plugins, training
from particlejax.config.fields import (
    Spec,
    above,
    arguments,
    as_dict,
    at_least,
    between,
    interval,
    make,
    named,
    named_in,
    number,
    one_of,
    replaced,
    section,
    some_of,
    unknown_key,
)
from particlejax.config.modalities import MODALITIES
from particlejax.config.model import OBJECTIVES, ModelSpec, check_stage
from particlejax.core.errors import UserError

# Plugins may add names; particles/policies.py and data/augment.py hold the implementations.
POLICIES: dict[str, None] = dict.fromkeys(("grid", "tubes", "pyramid", "adaptive", "run_length"))
AUGMENTATIONS: dict[str, None] = {}


__all__ = ("arguments", "as_dict", "make", "one_of", "section", "unknown_key")


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
    # GiB of memory per worker for a cache of decoded clips; 0: no cache
    ram_cache_gib: float = at_least(0.0, 0)
    # seconds after which decoding a clip fails; 0: no limit
    decode_timeout_seconds: float = at_least(60.0, 0)
    num_threads: int = at_least(2, 1)  # decoder threads per worker
    num_workers: int = at_least(0, 0)  # decoder processes; 0: threads of the main process


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
class OptimSpec(Spec):
    """The optimizer and its learning-rate schedule."""

    name: str = one_of("adamw", "sgd")  # optimizer (train/optim.py)
    # steps of warmup and decay, after which the rate stays constant; 0: all steps of the stage. Set
    # it to the old number of steps to make a run longer without stretching its schedule
    schedule_steps: int = at_least(0, 0)
    learning_rate: float = at_least(1e-3, 0)  # peak learning rate
    warmup_ratio: float = between(0.1, 0, 1)  # fraction of the steps for linear warmup
    final_lr_ratio: float = between(0.01, 0, 1)  # final learning rate, as a fraction of the peak
    # decoupled weight decay; not applied to norms, biases and single vectors
    weight_decay: float = at_least(0.05, 0)
    b1: float = between(0.9, 0, 1, open_at="most")  # decay of AdamW's first moment
    # decay of AdamW's second moment; MAE pretraining uses 0.95
    b2: float = between(0.95, 0, 1, open_at="most")
    momentum: float = between(0.9, 0, 1, open_at="most")  # momentum of SGD
    grad_clip_norm: float = at_least(1.0, 0)  # maximum global gradient norm; 0: no clipping


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


@dataclasses.dataclass(frozen=True)
class StageSpec(Spec):
    """One training stage. Set `num_steps` or `num_epochs`; the other is 0."""

    num_steps: int = at_least(0, 0)  # number of optimizer steps; 0: see `num_epochs`
    # number of passes over the training clips; 0: see `num_steps`
    num_epochs: float = at_least(0.0, 0)
    batch_size: int = at_least(32, 1)  # packed rows per batch, over all devices
    # number of micro-batches per optimizer step; their gradients are summed
    grad_accum_steps: int = at_least(1, 1)
    # initial parameters: name of an earlier stage, or RUN_DIR or RUN_DIR:STAGE of another run; '':
    # the experiment's init_from for the first stage
    init_from: str = ""
    # training losses by name, with their settings; their weighted sum is minimized
    objectives: Mapping[str, Any] = named(OBJECTIVES)
    optim: OptimSpec = OptimSpec()
    finetune: training.FinetuneSpec = training.FinetuneSpec()  # parameters to train
    # adversarial training and sharpness-aware minimization
    robust: training.RobustSpec = training.RobustSpec()
    # overrides of the experiment's model section
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # overrides of the experiment's data section
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # overrides of the experiment's particles section
    particles: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale_schedule: ScaleScheduleSpec = ScaleScheduleSpec()  # scales of the training clips
    val_split: str = "val"  # validation split; '': none
    val_every_steps: int = at_least(0, 0)  # steps between validations; 0: ten a run
    # decay of the parameters' moving average, which evaluation then uses; 0: none
    ema_decay: float = between(0.0, 0, 1, open_at="most")
    # validation metric that selects the best checkpoint; '': the last checkpoint
    best_metric: str = ""
    best_mode: str = one_of("max", "min")  # whether a larger or smaller `best_metric` is better
    # validations without a better `best_metric` before the stage stops; 0: never
    early_stopping_patience: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class EvalSpec(Spec):
    """The evaluation at the end of a stage with objective classify."""

    splits: tuple[str, ...] = ("val",)  # splits to evaluate on
    scale: ScaleSpec = ScaleSpec()  # overrides of the stage's data and particles
    # temporal clips and spatial crops per video; their probabilities are averaged
    views: tuple[int, int] = at_least((1, 1), 1)
    batch_size: int = at_least(32, 1)  # packed rows per batch, over all devices


@dataclasses.dataclass(frozen=True)
class MeshSpec(Spec):
    """Devices per mesh axis; -1 (at most once): all remaining devices."""

    data: int = at_least(-1, -1)  # devices for data parallelism
    fsdp: int = at_least(1, -1)  # devices that shard the batch, parameters and optimizer state
    tensor: int = at_least(1, -1)  # devices that shard layer widths
    sequence: int = at_least(1, -1)  # devices that shard the tokens of a row

    def check(self) -> None:
        """Raises UserError for an axis without devices and for several axes of -1."""
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size == 0:
                raise UserError(f"MeshSpec.{axis} is 0: use 1 or more devices, or -1 for the rest.")
        if list(sizes.values()).count(-1) > 1:
            raise UserError("MeshSpec.data and others are -1: only one axis can take the rest.")


@dataclasses.dataclass(frozen=True)
class DistributedSpec(Spec):
    """Multi-process training (jax.distributed); empty settings are read from the environment."""

    # auto: start jax.distributed if the settings or the environment name peers; off: one process
    start: str = one_of("auto", "off")
    coordinator_address: str = ""  # HOST:PORT of the first process; '': from the environment
    num_processes: int = at_least(0, 0)  # number of processes; 0: from the environment
    process_id: str = ""  # index of this process, from '0'; '': from the environment
    # seconds without a heartbeat after which a process counts as lost and the others stop
    heartbeat_timeout_seconds: int = at_least(100, 1)
    initialization_timeout: int = at_least(300, 1)  # seconds to wait for all processes at startup


@dataclasses.dataclass(frozen=True)
class CheckpointSpec(Spec):
    """When checkpoints are saved."""

    save_interval_steps: int = at_least(200, 1)  # steps between checkpoints
    # number of newest checkpoints to keep; at least 2, so one is intact during a save
    max_to_keep: int = at_least(2, 2)


@dataclasses.dataclass(frozen=True)
class LogSpec(Spec):
    """Logging besides metrics.jsonl and TensorBoard."""

    every_steps: int = at_least(20, 1)  # steps between log entries
    # peak FLOP rate for utilization: the device's table entry, or measured matrix products
    peak_flops: str = one_of("table", "measured")
    wandb_project: str = ""  # Weights & Biases project; '': none


@dataclasses.dataclass(frozen=True)
class PrepareSpec(Spec):
    """Job prepare_data: the data set to write."""

    data_dir: str = ""  # directory for the data set NAME/1.0.0; '': the workdir
    name: str = "mine"  # name of the data set
    clips_per_shard: int = at_least(256, 1)  # clips per shard
    num_workers: int = at_least(2, 1)  # worker processes
    # whether to use Apache Beam, with the runner of its options or the local one
    beam: bool = False


@dataclasses.dataclass(frozen=True)
class BenchSpec(Spec):
    """Benchmark settings; repetitions are interleaved and medians reported."""

    repetitions: int = at_least(7, 1)  # repetitions of each measurement
    num_clips: int = at_least(320, 1)  # clips per repetition
    batch_size: int = at_least(16, 1)  # packed rows per batch
    memory_clips: int = at_least(10000, 1)  # clips to read while memory use is measured
    # compute dtypes of bench_videomae, for both models
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    # faults to inject; `repetitions` is the number of kills
    faults: tuple[str, ...] = (
        "sigkill",
        "sigterm",
        "corrupt_checkpoint",
        "disk_full",
        "lost_process",
    )


@dataclasses.dataclass(frozen=True)
class SweepSpec(Spec):
    """Job sweep: several runs of one experiment."""

    # overrides of the experiment by run name, as nested dicts
    runs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # random seeds of every run; a search uses the first
    seeds: tuple[int, ...] = at_least((0, 1, 2), 0)
    metric: str = "finetune/val/top1"  # metric to compare: STAGE/SPLIT/METRIC of results.json
    # file or database URL of the Optuna study that processes share; '': this process alone
    storage: str = ""
    # number of Optuna trials that combine the runs' settings; 0: run them as they are
    num_trials: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class Experiment(Spec):
    """All settings of a run; config.json is enough to repeat it."""

    # job to run
    job: str = one_of(
        "train",
        "sweep",
        "evaluate",
        "prepare_data",
        "check_data",
        "bench_dataloader",
        "bench_particles",
        "bench_fault_tolerance",
        "bench_videomae",
        "model_soup",
        "fewshot_prototypes",
        "active_learning",
    )
    seed: int = at_least(0, 0)  # random seed of parameters, augmentation, masks and clip order
    # Python modules that register objectives, policies, augmentations, sources or networks
    plugins: tuple[str, ...] = ()
    run: str = ""  # RUN_DIR to use in jobs evaluate, fewshot_prototypes and active_learning
    runs: tuple[str, ...] = ()  # runs of job model_soup, each RUN_DIR or RUN_DIR:STAGE
    model_soup: training.ModelSoupSpec = training.ModelSoupSpec()
    active_learning: training.ActiveLearningSpec = training.ActiveLearningSpec()
    # RUN_DIR or RUN_DIR:STAGE that initializes the first stage; encoder settings come from it; '':
    # random
    init_from: str = ""
    data: DataSpec = DataSpec()
    particles: ParticleSpec = ParticleSpec()
    model: ModelSpec = ModelSpec()
    # training stages by name
    stages: Mapping[str, StageSpec] = dataclasses.field(default_factory=dict)
    # names of the stages to run, in order; () if there is only one
    stage_order: tuple[str, ...] = ()
    eval: EvalSpec = EvalSpec()
    # at a NaN or Inf in loss or gradient: stop, or skip the step
    on_nan: str = one_of("stop", "skip")
    # first and last step of a profiler trace in profile/; (0, 0): none
    profile_steps: tuple[int, int] = interval((0, 0), 0)
    mesh: MeshSpec = MeshSpec()
    distributed: DistributedSpec = DistributedSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    log: LogSpec = LogSpec()
    sweep: SweepSpec = SweepSpec()
    prepare: PrepareSpec = PrepareSpec()
    bench: BenchSpec = BenchSpec()

    def check(self) -> None:
        """Sorts the stages by `stage_order`. Raises UserError if they cannot be run."""
        if len(self.stages) > 1 and not self.stage_order:
            raise UserError(
                "Experiment.stage_order is empty: name the stages to run in their order "
                f"({', '.join(self.stages)})."
            )
        for name in self.stage_order:
            if name not in self.stages:
                raise UserError(unknown_key(name, "Experiment.stages", self.stages))
        order = self.stage_order or tuple(self.stages)
        object.__setattr__(self, "stages", {name: self.stages[name] for name in order})
        for name, stage in self.stages.items():
            _check_lengths(stage, f"Experiment.stages.{name}")
            _check_objectives(self, stage, f"Experiment.stages.{name}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Experiment":
        """Returns the experiment of a config. Raises UserError for an invalid key or value."""
        plugins.load(*config.get("plugins", ()))
        return make(cls, config, "config")

    def data_of(self, stage: StageSpec) -> DataSpec:
        """Returns the data section with the stage's overrides."""
        return replaced(self.data, stage.data, "config.stages.*.data")

    def particles_of(self, stage: StageSpec) -> ParticleSpec:
        """Returns the particles section with the stage's overrides."""
        return replaced(self.particles, stage.particles, "config.stages.*.particles")

    def model_of(self, stage: StageSpec) -> ModelSpec:
        """Returns the model section with the stage's overrides."""
        return replaced(self.model, stage.model, "config.stages.*.model")


def _check_lengths(stage: StageSpec, key_path: str) -> None:
    if bool(stage.num_steps) == bool(stage.num_epochs):
        raise UserError(
            f"{key_path} has num_steps={stage.num_steps} and num_epochs={stage.num_epochs:g}: set "
            "one of them, and the other to 0."
        )
    if stage.early_stopping_patience and not stage.best_metric:
        raise UserError(
            f"{key_path}.early_stopping_patience={stage.early_stopping_patience} needs "
            "best_metric: set it to a validation metric such as 'loss' or 'top1', or set "
            "early_stopping_patience to 0."
        )
    if stage.batch_size % stage.grad_accum_steps:
        raise UserError(
            f"{key_path}.batch_size={stage.batch_size} is not a multiple of "
            f"grad_accum_steps={stage.grad_accum_steps}: change one of them."
        )


def _check_objectives(experiment: Experiment, stage: StageSpec, key_path: str) -> None:
    if not stage.objectives:
        raise UserError(f"{key_path} has no objective: add one of {', '.join(OBJECTIVES)}.")
    data, particles = experiment.data_of(stage), experiment.particles_of(stage)
    model = experiment.model_of(stage)
    sync, words = (
        stage.objectives.get("synchronization"),
        stage.objectives.get("masked_visual_tokens"),
    )
    if sync and "vision" in sync.laid and particles.patch_size[0] >= data.num_frames:
        raise UserError(
            f"{key_path}.objectives.synchronization needs at least 2 time steps, but "
            f"particles.patch_size[0]={particles.patch_size[0]} covers all {data.num_frames} "
            "frames: use a smaller one, such as 2, or synchronization.method 'joint'."
        )
    if words and (stage.finetune.method != "full" or words.modality == "text"):
        raise UserError(
            f"{key_path}.objectives.masked_visual_tokens clusters numeric payloads and trains all "
            "parameters: set finetune.method to 'full' and use a modality other than text."
        )
    if "jepa" in stage.objectives and (not stage.ema_decay or model.token_reduction_layers):
        raise UserError(
            f"{key_path}.objectives.jepa needs an EMA teacher with the same tokens: set "
            f"{key_path}.ema_decay, such as to 0.99, and leave model.token_reduction_layers empty."
        )
    check_stage(stage.objectives, stage.finetune, model, key_path)
