# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained run on any source whose labels have the run's names: results.json,
predictions.csv, report.md.

    python -m particlejax.main --config experiments/evaluate.py --config.run=RUN_DIR \
        --config.data.source=folder:PATH --config.data.split=test

Frames, sizes and particles are the run's own, but for what config.eval.scale says (frames,
size, seconds, policy, budget, ...): any scale goes through the same parameters. Of config.data only
the source, split, cache_dir, max_bad, threads and workers
count. An empty source is the run's. Takes seconds for a hundred short clips.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import DataSpec, EvalSpec, Experiment, arguments, section


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (one view a clip)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            Experiment,
            job="evaluate",
            run="",
            data=section(DataSpec, source="", split="val"),
            eval=section(EvalSpec, views=(1, 1) if tiny else (2, 3)),
        )
    )
