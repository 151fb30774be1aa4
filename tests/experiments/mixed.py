# SPDX-License-Identifier: Apache-2.0
"""The tiny fine-tuning with clips of three sizes in its rows."""

import runpy

from ml_collections import ConfigDict

from particlejax.config.experiment import ScaleScheduleSpec, ScaleSpec, section


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; it takes no argument."""
    del arg
    config = runpy.run_path("experiments/finetune.py")["get_config"]("tiny")
    scales = (
        section(ScaleSpec),
        section(ScaleSpec, image_size=16),
        section(ScaleSpec, image_size=24),
    )
    config.stages.finetune.scale_schedule = section(
        ScaleScheduleSpec, kind="mixture", scales=scales
    )
    return config
