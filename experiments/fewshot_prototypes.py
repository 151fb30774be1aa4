# SPDX-License-Identifier: Apache-2.0
"""Few-shot classification by class means of a trained encoder's features, without training.

    python -m particlejax.main --config experiments/fewshot_prototypes.py \
        --config.run=RUN_DIR[:STAGE] --config.data.shots=5 \
        --config.data.source=folder:PATH

config.seed draws the labelled clips from `config.data.split`; `config.eval.splits` are evaluated.
An empty source is the run's. Takes as long as an evaluation.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import EvalSpec, FewshotPrototypesJob, LabeledDataSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (one clip a class)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            FewshotPrototypesJob,
            data=section(LabeledDataSpec, source="", split="train", shots=1 if tiny else 5),
            eval=section(EvalSpec, splits=("val",)),
        )
    )
