# SPDX-License-Identifier: Apache-2.0
"""Averages several runs, or one run's last checkpoints, into one model.

    python -m particlejax.main --config experiments/model_soup.py \
        --config.runs="('runs/a','runs/b')" [--config.model_soup.method=greedy]

`uniform` averages the parameters of all runs, `greedy` those of the runs that improve the accuracy
on `data.split`; `ensemble` averages the predictions. With a single run, the job merges fine-tuned
parameters into the base. WORKDIR/model is a run that evaluate.py and a stage's init_from accept. An
empty source is the first run's. Takes as long as an evaluation of each run.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import MeasureSpec, ModelSoupJob, RunDataSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (one view a clip)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            ModelSoupJob,
            runs=(),
            data=section(RunDataSpec, source="", split="val"),
            eval=section(MeasureSpec, views=(1, 1) if tiny else (2, 3)),
        )
    )
