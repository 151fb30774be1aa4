# SPDX-License-Identifier: Apache-2.0
"""Makes one model of several runs, or of one run's newest checkpoints; with one run it merges what
was fine-tuned into its base.

    python -m particlejax.main --config experiments/model_soup.py \
        --config.runs="('runs/a','runs/b')" [--config.model_soup.method=greedy]

`average` takes the mean of the parameters, `greedy` of those runs that help on `data.split`,
`ensemble` the mean of the answers. The model is a run in WORKDIR/model, as evaluate.py and a
stage's init want one. An empty source is the first run's. Takes the time of an evaluation for each
run.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import DataSpec, EvalSpec, Experiment, arguments, section


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (one view a clip)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            Experiment,
            job="model_soup",
            runs=(),
            data=section(DataSpec, source="", split="val"),
            eval=section(EvalSpec, views=(1, 1) if tiny else (2, 3)),
        )
    )
