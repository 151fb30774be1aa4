# SPDX-License-Identifier: Apache-2.0
"""What the frozen encoder of a run knows: k-NN and linear probes, retrieval R@1/5/10 both ways, its objectives on unseen clips.

    python -m particlejax.main --config experiments/probe.py --config.run=RUN_DIR
    python -m particlejax.main --config experiments/probe.py --config.run=RUN_DIR --config.weights=random

The second is the same encoder untrained: what pretraining must beat. Seconds on the toybox. An attentive probe is a stage that
trains no more than the pooling head; see experiments/finetune.py.
"""

from ml_collections import ConfigDict

from particlejax.jobspec import ProbeSpec
from particlejax.spec import arguments, section


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny'."""
    arguments(arg, "tiny")
    return ConfigDict(section(ProbeSpec))
