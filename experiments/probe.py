# SPDX-License-Identifier: Apache-2.0
"""Probes a frozen encoder: k-NN, linear and attentive probes, retrieval, objectives.

    python -m particlejax.main --config experiments/probe.py --config.run=RUN_DIR
    python -m particlejax.main --config experiments/probe.py --config.run=RUN_DIR \
        --config.weights=random

Retrieval is R@1/5/10 in both directions. The second command probes the same encoder untrained, the
baseline of pretraining. The attentive probe holds every token of every clip in memory (2 bytes a
number; --config.attentive_steps=0 skips it). For larger data or augmentation, train the pooling
head in a stage (finetune.method='attentive_probe', experiments/finetune.py).
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import ProbeSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny'."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(section(ProbeSpec, attentive_steps=20 if tiny else 400))
