# SPDX-License-Identifier: Apache-2.0
"""What the frozen encoder of a run knows: k-NN, linear and attentive probes, retrieval R@1/5/10
both ways, its objectives on unseen clips.

    python -m particlejax.main --config experiments/probe.py --config.run=RUN_DIR
    python -m particlejax.main --config experiments/probe.py --config.run=RUN_DIR \
        --config.weights=random

The second is the same encoder untrained: what pretraining must beat. The attentive probe holds
every token of every clip in memory (2 bytes a number; --config.attentive_steps=0 leaves it out);
where that is too much, or data shall be augmented, let a stage train the pooling head alone
(finetune.method='attentive_probe', experiments/finetune.py).
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.jobs import ProbeSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(section(ProbeSpec, attentive_steps=20 if tiny else 400))
