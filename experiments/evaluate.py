# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained run on any source with the same class names.

    python -m particlejax.main --config experiments/evaluate.py --config.run=RUN_DIR \
        --config.data.source=folder:PATH --config.data.split=test

Writes results.json, predictions.csv and report.md. The split 'all' is every clip of every split.
Frames, sizes, particles, classes and label map are the run's; config.eval.scale (num_frames,
image_size, clip_seconds, policy, budget, ...) changes them without new parameters. Of config.data
only source, split, cache_dir, max_unreadable, num_threads and num_workers are used. An empty source
is the run's. Takes seconds for a hundred short clips.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import EvaluateJob, MeasureSpec, RunDataSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (one view a clip)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            EvaluateJob,
            run="",
            data=section(RunDataSpec, source="", split="val"),
            eval=section(MeasureSpec, views=(1, 1) if tiny else (2, 3)),
        )
    )
