# SPDX-License-Identifier: Apache-2.0
"""Active learning: selects the unlabelled clips to label next with a trained run.

    python -m particlejax.main --config experiments/active_learning.py \
        --config.run=RUN_DIR --config.data.source=folder:PATH \
        [--config.active_learning.strategy=coreset] [--config.active_learning.num_clips=20] \
        [--config.data.labelled_csv=listed.csv] --workdir runs/round1

WORKDIR/next.csv lists the selected clips. Label them in clips.csv and train again. To simulate
this on a data set that is fully labelled, train with
`--config.data.labelled_csv=WORKDIR/listed.csv`, which ignores all other labels. Takes as long as
two evaluations.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import ActiveLearningJob, ActiveLearningSpec, LabeledDataSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (one labelled clip a class, three selected)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            ActiveLearningJob,
            data=section(LabeledDataSpec, source="", split="train", shots=1 if tiny else 0),
            active_learning=section(ActiveLearningSpec, num_clips=3 if tiny else 20),
        )
    )
