# SPDX-License-Identifier: Apache-2.0
"""What an experiment may say: one frozen dataclass a section, the only place where a default
stands.

An experiment file fills a ConfigDict made of these (`section`), `Experiment.of` turns it back into
them in one hop, and an unknown key is an error that names the nearest known one.
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

# what experiment files are written with
# names that plugins may add to; particles/policies.py and data/augment.py hold what they stand for
POLICIES: dict[str, None] = dict.fromkeys(("grid", "tubes", "pyramid", "adaptive", "runs"))
AUGMENTATIONS: dict[str, None] = {}


__all__ = ("arguments", "as_dict", "make", "one_of", "section", "unknown_key")


@dataclasses.dataclass(frozen=True)
class AugmentSpec(Spec):
    """What training does to a clip at random, alike in all its frames; evaluation does none of
    it.
    """

    # share of the area that a random resized crop keeps
    crop_scale: tuple[float, float] = interval((1.0, 1.0), 0.01, 1)
    hflip_prob: float = between(0.0, 0, 1)  # probability of mirroring left and right
    # classes that mirroring would make another: these are never flipped
    no_flip_classes: tuple[str, ...] = ()
    # factors that the span of the frames is stretched by, log-uniform
    speed_range: tuple[float, float] = interval((1.0, 1.0), 0.01)
    # of brightness, contrast, saturation (as factors 1 +- this) and, a quarter as much, hue
    color_jitter: float = at_least(0.0, 0)
    randaug_num_ops: int = at_least(0, 0)  # of RandAugment (arXiv:1909.13719)
    randaug_magnitude: float = between(0.5, 0, 1)  # of RandAugment, in [0, 1]
    # probability that a box of 2 to 33 % of the picture is grey (arXiv:1708.04896)
    random_erasing_prob: float = between(0.0, 0, 1)
    mixup_alpha: float = at_least(0.0, 0)  # alpha of MixUp (arXiv:1710.09412); 0: none
    # alpha of CutMix (arXiv:1905.04899); where both are set each clip draws one
    cutmix_alpha: float = at_least(0.0, 0)
    audio_gain_db: float = at_least(0.0, 0)  # dB that sound is made louder or softer by, at most
    # seconds that sound is moved against sight, at most
    audio_shift_seconds: float = at_least(0.0, 0)
    # augmentations of plugins, by name, in this order after the others
    custom: tuple[str, ...] = some_of((), AUGMENTATIONS, 0)
    # of time, and as many of frequency, that SpecAugment empties (arXiv:1904.08779)
    specaugment_num_masks: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class AudioSpec(Spec):
    """Sound as a log-mel spectrogram, cut into patches."""

    # samples per second; any track is mixed to one channel of it
    sample_rate: int = at_least(16000, 1)
    window_seconds: float = at_least(0.025, 1e-4)  # seconds of a spectrum
    hop_seconds: float = at_least(0.010, 1e-4)  # seconds from one spectrum to the next
    num_mels: int = at_least(64, 1)
    f_min: float = at_least(60.0, 0)  # Hz
    f_max: float = at_least(7800.0, 0)  # Hz
    patch_size: tuple[int, int] = at_least((16, 16), 1)  # spectra, mels
    mean: float = number(-7.0)  # of log(mel power + 1e-6)
    std: float = at_least(4.0, 1e-4)
    max_seconds: float = at_least(0.0, 0)  # longest sound; 0: data.clip_seconds


@dataclasses.dataclass(frozen=True)
class TextSpec(Spec):
    """Captions as token ids."""

    tokenizer: str = "bytes"  # or the path of a tokenizer.json of the package `tokenizers`
    max_length: int = at_least(64, 1)  # most tokens of a clip


@dataclasses.dataclass(frozen=True)
class TimeseriesSpec(Spec):
    """Numeric channels from a CSV beside the clip (clip.mp4, clip.csv) with a column `time` in
    seconds.
    """

    channels: tuple[str, ...] = ()  # columns
    # values per second that the channels are interpolated to
    sample_rate: float = at_least(30.0, 1e-3)
    patch_length: int = at_least(15, 1)  # values of a particle
    max_seconds: float = at_least(0.0, 0)  # longest series; 0: data.clip_seconds


@dataclasses.dataclass(frozen=True)
class FeatureSpec(Spec):
    """What a frozen network says of sub-clips, computed before by job extract_features.

    It saw the clip's centre square, not mirrored, or heard its sound, or read its caption.
    """

    # that the job wrote; it says which network, how long sub-clips are and how many cells each has
    folder: str = ""
    max_seconds: float = at_least(0.0, 0)  # longest span; 0: data.clip_seconds
    # each feature by its mean and deviation over all clips; particles to equal length
    normalization: str = one_of("standardize", "rms")


@dataclasses.dataclass(frozen=True)
class DataSpec(Spec):
    """Which clips, and how frames are taken from them.

    A clip shorter than what is asked of it shows its last frame until the span is over, in every
    way of sampling; its sound and series end where they end. Of MP4, Matroska and MPEG-TS only what
    is wanted is decoded; any other container is read from its start, so clips late in a long film
    of that kind need a larger `time_limit`, or an MP4 made of it. Where `memory_gib` is 0, parts of
    pictures of 128 pixels and more are cut and scaled from the file's own pixels in one pass.
    """

    source: str = "toybox"  # toybox | folder:PATH | tfds:NAME | mix:WEIGHT*SOURCE,WEIGHT*SOURCE
    split: str = "train"
    # of vision, audio, text, timeseries, video_features, audio_features, text_features
    modalities: tuple[str, ...] = some_of(("vision",), MODALITIES)
    # frames: even over `seconds`; every `stride`-th; one a segment
    frame_sampling: str = one_of("uniform", "dense", "segment")
    # frames of the file from one to the next where `sample` is dense, drawn between
    frame_stride: tuple[int, int] = interval((2, 2), 1)
    # of the clips to train on, the same ones whatever the seed: few labels, quick trials
    train_fraction: float = between(1.0, 0, 1, open_at="least")
    # clips of each class, drawn by the seed, that keep their label in training; 0: all do
    shots: int = at_least(0, 0)
    labelled_csv: str = (
        ""  # CSV with a column `path` of the clips that keep their label; '': as `shots` says
    )
    # share of training clips that come from the others, without label; 0: none
    unlabelled_fraction: float = between(0.0, 0, 1)
    cache_dir: str = "~/.cache/particlejax"  # where toybox is rendered and TFDS looks
    num_frames: int = at_least(16, 1)
    image_size: int = at_least(64, 1)  # pixels, height and width
    clip_seconds: float = at_least(0.0, 0)  # span of the frames; 0: the whole clip
    # pixels of the short side of small or kept clips, from which parts are cut; 0: `size`
    decode_short_side: int = at_least(0, 0)
    augment: AugmentSpec = AugmentSpec()
    audio: AudioSpec = AudioSpec()
    text: TextSpec = TextSpec()
    timeseries: TimeseriesSpec = TimeseriesSpec()
    video_features: FeatureSpec = FeatureSpec()
    audio_features: FeatureSpec = FeatureSpec()  # those of a second network, such as one of sound
    text_features: FeatureSpec = FeatureSpec()  # those of a third, such as one of words
    image_mean: float = number(0.45)  # of pixels in [0, 1]
    image_std: float = at_least(0.225, 1e-4)
    # share of a particle's mean over time that stays in it: below 1 change counts for more
    temporal_mean_scale: float = between(1.0, 0, 1)
    clips_per_row: int = at_least(1, 1)
    max_unreadable: int = at_least(100, 0)  # unreadable clips after which the run stops
    # of memory in each worker for clips decoded before; 0: decode anew each time
    ram_cache_gib: float = at_least(0.0, 0)
    # seconds that a clip may take to decode before it counts as unreadable; 0: any
    decode_timeout_seconds: float = at_least(60.0, 0)
    num_threads: int = at_least(2, 1)  # that decode, in each worker
    num_workers: int = at_least(0, 0)  # processes that decode; 0: threads of this process


@dataclasses.dataclass(frozen=True)
class ParticleSpec(Spec):
    """How a clip is cut into particles."""

    policy: str = named_in("grid", POLICIES)
    # frames, rows, columns of the cuboid that a payload holds
    patch_size: tuple[int, int, int] = at_least((2, 16, 16), 1)
    # of coarseness from one pyramid level to the next
    level_factor: tuple[int, int, int] = at_least((2, 2, 2), 1)
    # of the pyramid, the finest included; of adaptive particles on each axis that splits
    num_levels: int = at_least(3, 1)
    # how an adaptive particle may be split: of both (at once), time, space
    split_axes: tuple[str, ...] = some_of(("time", "space"), ("spacetime", "time", "space"))
    # what an adaptive split is worth (particles/adaptive.py)
    split_criterion: str = one_of("squared_error", "absolute_error", "motion")
    # mean absolute difference, of 255, above which a run ends where there is no budget
    run_threshold: float = at_least(0.0, 0)
    tubes: tuple = ()  # of (shape, stride) or (shape, stride, offset), each three numbers
    # most particles of a clip: spent by adaptive and runs, else kept at random; 0: all
    budget: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class OptimSpec(Spec):
    """The optimiser and its schedule."""

    name: str = one_of("adamw", "sgd")
    # steps of warm-up and decay, after which the rate stays at its end; 0: all of the stage's. To
    # make a run longer without stretching its schedule, set this to the steps that it had before
    schedule_steps: int = at_least(0, 0)
    learning_rate: float = at_least(1e-3, 0)  # peak learning rate
    warmup_ratio: float = between(0.1, 0, 1)  # share of the steps
    final_lr_ratio: float = between(0.01, 0, 1)  # learning rate at the end, in peaks
    weight_decay: float = at_least(0.05, 0)  # decoupled; spares norms, biases and single vectors
    b1: float = between(0.9, 0, 1, open_at="most")
    b2: float = between(0.95, 0, 1, open_at="most")  # as MAE pretraining has it
    momentum: float = between(0.9, 0, 1, open_at="most")  # of sgd
    grad_clip_norm: float = at_least(1.0, 0)  # largest gradient norm; 0: any


@dataclasses.dataclass(frozen=True)
class ScaleSpec(Spec):
    """How clips are read for a part of the training; what is 0 or '' is as the stage's data and
    particles say.
    """

    num_frames: int = at_least(0, 0)
    image_size: int = at_least(0, 0)  # pixels
    clip_seconds: float = at_least(0.0, 0)  # span of the frames: with their number, the speed
    frame_stride: int = at_least(0, 0)  # the speed where data.frame_sampling is dense
    policy: str = ""
    num_levels: int = at_least(0, 0)
    split_axes: tuple[str, ...] = ()
    budget: int = at_least(0, 0)
    tubes: tuple = ()
    # of the clips (mixture), of the training (progressive) or of a round (cycles), beside the
    # others'
    weight: float = above(1.0, 0)

    def applied(self, data: DataSpec, particles: ParticleSpec) -> tuple[DataSpec, ParticleSpec]:
        """Data and particles as this scale says."""
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
    """Which scale when; rows keep their shape, so that nothing is compiled anew."""

    # each clip draws; in order; in order, again and again
    kind: str = one_of("fixed", "mixture", "progressive", "cycles")
    scales: tuple[ScaleSpec, ...] = ()
    num_cycles: int = at_least(1, 1)  # of cycles: the long cycle of Multigrid (arXiv:1912.00998)
    final_fraction: float = between(
        0.0, 0, 1, open_at="most"
    )  # share of the training at the end of cycles that stays at the last scale
    # factors of the size that follow each other from step to step: its short cycle
    short_cycle_factors: tuple[float, ...] = above((), 0)

    def check(self) -> None:
        """Raises UserError for scales or settings that the kind does not use."""
        if (self.kind == "fixed") == bool(self.scales):
            remedy = "name another kind" if self.scales else "give it some, or leave it 'fixed'"
            raise UserError(
                f"ScaleScheduleSpec.kind is {self.kind!r} with {len(self.scales)} scales: {remedy}."
            )
        if self.kind != "cycles" and (
            self.num_cycles != 1 or self.final_fraction or self.short_cycle_factors
        ):
            raise UserError(
                "ScaleScheduleSpec.num_cycles, settle and short belong to 'cycles', and kind is "
                f"{self.kind!r}: make it that, or leave them."
            )


@dataclasses.dataclass(frozen=True)
class StageSpec(Spec):
    """One training run. `steps` or `epochs`, the other 0."""

    num_steps: int = at_least(0, 0)
    num_epochs: float = at_least(0.0, 0)
    batch_size: int = at_least(32, 1)  # of a batch, over all devices
    grad_accum_steps: int = at_least(1, 1)  # micro-batches that a step's gradient is summed over
    # where parameters start: an earlier stage's name, or RUN_DIR or RUN_DIR:STAGE of another run
    init_from: str = ""
    objectives: Mapping[str, Any] = named(OBJECTIVES)
    optim: OptimSpec = OptimSpec()
    finetune: training.FinetuneSpec = training.FinetuneSpec()  # which parameters train
    robust: training.RobustSpec = training.RobustSpec()  # where the gradient is taken
    # what differs from the experiment's
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # what differs from the experiment's
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # what differs from the experiment's
    particles: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # scales that the training clips are read at
    scale_schedule: ScaleScheduleSpec = ScaleScheduleSpec()
    val_split: str = "val"  # split that is measured while training; '': none
    val_every_steps: int = at_least(0, 0)  # 0: ten times a run, every 10 steps at most
    ema_decay: float = between(
        0.0, 0, 1, open_at="most"
    )  # decay of the averaged parameters, which are then the ones evaluated; 0: none
    best_metric: str = ""  # val metric whose best checkpoint is the stage's result; '': the last
    best_mode: str = one_of("max", "min")
    # measurements without a better `select` after which the stage ends; 0: never
    early_stopping_patience: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class EvalSpec(Spec):
    """The measurement at the end of a stage that classifies."""

    splits: tuple[str, ...] = ("val",)
    scale: ScaleSpec = ScaleSpec()  # what differs from the stage's data and particles
    # temporal clips x spatial crops per video, probabilities averaged
    views: tuple[int, int] = at_least((1, 1), 1)
    batch_size: int = at_least(32, 1)


@dataclasses.dataclass(frozen=True)
class MeshSpec(Spec):
    """Devices per axis of the mesh; -1 (at most once): the rest."""

    data: int = at_least(-1, -1)
    fsdp: int = at_least(1, -1)
    tensor: int = at_least(1, -1)
    sequence: int = at_least(1, -1)

    def check(self) -> None:
        """Raises UserError for an axis without devices, and for two that take the rest."""
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size == 0:
                raise UserError(f"MeshSpec.{axis} is 0: use 1 or more devices, or -1 for the rest.")
        if list(sizes.values()).count(-1) > 1:
            raise UserError("MeshSpec.data and others are -1: only one axis can take the rest.")


@dataclasses.dataclass(frozen=True)
class DistributedSpec(Spec):
    """How several processes find each other (cluster.py); what is left empty comes from the
    environment.
    """

    start: str = one_of("auto", "off")
    coordinator_address: str = ""  # HOST:PORT of the first process
    num_processes: int = at_least(0, 0)  # how many
    process_id: str = ""  # which one this is, '0' for the first
    # seconds without a sign of life after which a process counts as lost, and the others end
    heartbeat_timeout_seconds: int = at_least(100, 1)
    initialization_timeout: int = at_least(300, 1)  # seconds to wait for all processes at the start


@dataclasses.dataclass(frozen=True)
class CheckpointSpec(Spec):
    """When the state is saved."""

    save_interval_steps: int = at_least(200, 1)  # steps
    max_to_keep: int = at_least(
        2, 2
    )  # newest ones; at least 2, so that a whole one remains while the next is written


@dataclasses.dataclass(frozen=True)
class LogSpec(Spec):
    """Where figures go, besides metrics.jsonl and TensorBoard."""

    every_steps: int = at_least(20, 1)  # steps
    # rate that FLOP utilisation is a share of: the device's, or of products timed first
    peak_flops: str = one_of("table", "measured")
    wandb_project: str = ""  # project of Weights & Biases; '': none


@dataclasses.dataclass(frozen=True)
class PrepareSpec(Spec):
    """Job prepare_data: where the data set goes and who writes it."""

    data_dir: str = ""  # folder that the data set NAME/1.0.0 is made in; '': the workdir
    name: str = "mine"
    clips_per_shard: int = at_least(256, 1)  # clips
    num_workers: int = at_least(2, 1)  # processes
    beam: bool = False  # by Apache Beam, on its local runner or on whatever its options name


@dataclasses.dataclass(frozen=True)
class BenchSpec(Spec):
    """Benchmarks: interleaved repetitions, of which medians are taken."""

    repetitions: int = at_least(7, 1)
    num_clips: int = at_least(320, 1)  # of a repetition
    batch_size: int = at_least(16, 1)
    memory_clips: int = at_least(10000, 1)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # that the peer and ours compute in
    # that are injected; `repetitions` are the kills
    faults: tuple[str, ...] = (
        "sigkill",
        "sigterm",
        "corrupt_checkpoint",
        "disk_full",
        "lost_process",
    )


@dataclasses.dataclass(frozen=True)
class SweepSpec(Spec):
    """Job sweep: several runs of the experiment."""

    # by name, what differs, nested
    runs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = at_least((0, 1, 2), 0)
    metric: str = "finetune/val/top1"  # stage/split/figure of results.json
    # a file, or a database's URL, through which Optuna shares the runs out to processes; '': all
    # are this one's
    storage: str = ""
    # trials in which Optuna combines the settings of the runs; 0: the runs as they are
    num_trials: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class Experiment(Spec):
    """Everything a run depends on, so that config.json is enough to run it again."""

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
    seed: int = at_least(0, 0)
    # modules of your own that add objectives, policies, augmentations, sources or networks
    plugins: tuple[str, ...] = ()
    run: str = ""  # jobs evaluate, prototypes, label_next: the run that is asked
    # job model_soup: the runs that are averaged, each RUN_DIR or RUN_DIR:STAGE
    runs: tuple[str, ...] = ()
    model_soup: training.ModelSoupSpec = training.ModelSoupSpec()
    active_learning: training.ActiveLearningSpec = training.ActiveLearningSpec()
    # RUN_DIR or RUN_DIR:STAGE that the first stage starts from; encoder and payloads are then as
    # there
    init_from: str = ""
    data: DataSpec = DataSpec()
    particles: ParticleSpec = ParticleSpec()
    model: ModelSpec = ModelSpec()
    stages: Mapping[str, StageSpec] = dataclasses.field(default_factory=dict)
    # in which stages run, those not named are left out; () where there is but one
    stage_order: tuple[str, ...] = ()
    eval: EvalSpec = EvalSpec()
    # at a loss or gradient that is no number: stop, or leave the step out
    on_nan: str = one_of("stop", "skip")
    # the first and the last step of a profiler trace in profile/; 0: none
    profile_steps: tuple[int, int] = interval((0, 0), 0)
    mesh: MeshSpec = MeshSpec()
    distributed: DistributedSpec = DistributedSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    log: LogSpec = LogSpec()
    sweep: SweepSpec = SweepSpec()
    prepare: PrepareSpec = PrepareSpec()
    bench: BenchSpec = BenchSpec()

    def check(self) -> None:
        """Puts the stages in their order. Raises UserError where they cannot be run."""
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
        """The experiment that a config describes. Raises UserError for a key or a value that it
        cannot have.
        """
        plugins.load(*config.get("plugins", ()))
        return make(cls, config, "config")

    def data_of(self, stage: StageSpec) -> DataSpec:
        """The data section with what the stage says differently."""
        return replaced(self.data, stage.data, "config.stages.*.data")

    def particles_of(self, stage: StageSpec) -> ParticleSpec:
        """The particles section with what the stage says differently."""
        return replaced(self.particles, stage.particles, "config.stages.*.particles")

    def model_of(self, stage: StageSpec) -> ModelSpec:
        """The model section with what the stage says differently."""
        return replaced(self.model, stage.model, "config.stages.*.model")


def _check_lengths(stage: StageSpec, where: str) -> None:
    if bool(stage.num_steps) == bool(stage.num_epochs):
        raise UserError(
            f"{where} gives steps={stage.num_steps} and epochs={stage.num_epochs:g}: set one of "
            "them, the "
            "other to 0."
        )
    if stage.early_stopping_patience and not stage.best_metric:
        raise UserError(
            f"{where}.early_stopping_patience={stage.early_stopping_patience} waits for a better "
            "`select`, which is empty: name "
            "a metric of the val split there, such as 'loss' or 'top1', or set patience to 0."
        )
    if stage.batch_size % stage.grad_accum_steps:
        raise UserError(
            f"{where}.batch_size={stage.batch_size} is not a multiple of "
            f"accumulate={stage.grad_accum_steps}: change "
            "one."
        )


def _check_objectives(experiment: Experiment, stage: StageSpec, where: str) -> None:
    if not stage.objectives:
        raise UserError(f"{where} has no objective: add one of {', '.join(OBJECTIVES)}.")
    data, particles = experiment.data_of(stage), experiment.particles_of(stage)
    model = experiment.model_of(stage)
    sync, words = (
        stage.objectives.get("synchronization"),
        stage.objectives.get("masked_visual_tokens"),
    )
    if sync and "vision" in sync.laid and particles.patch_size[0] >= data.num_frames:
        raise UserError(
            f"{where}.objectives.synchronization needs at least 2 time steps, but "
            f"particles.patch_size[0]={particles.patch_size[0]} covers all {data.num_frames} "
            "frames: use a smaller "
            "one, such as 2, or synchronization.method 'question'."
        )
    if words and (stage.finetune.method != "full" or words.modality == "text"):
        raise UserError(
            f"{where}.objectives.masked_visual_tokens finds clusters of numbers, which are kept "
            "beside "
            "parameters that all train: leave finetune.method at 'full', and name a modality other "
            "than "
            "text."
        )
    if "jepa" in stage.objectives and (not stage.ema_decay or model.token_reduction_layers):
        raise UserError(
            f"{where}.objectives.jepa learns from the average of the parameters, slot by slot: "
            f"set {where}.ema_decay, such as to 0.99, and leave model.token_reduction_layers empty."
        )
    check_stage(stage.objectives, stage.finetune, model, where)
