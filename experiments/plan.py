# SPDX-License-Identifier: Apache-2.0
"""Estimates memory, collectives and step time of an experiment on devices you need not have.

    python -m particlejax.main --config experiments/plan.py \
        --config.experiment=experiments/pretrain/videomae_base.py \
        --config.per_device_batch_size=32 --config.topology=v5e:2x2,v5e:16x16

For TPUs run `pip install -e ".[plan]"`, preferably in a separate environment.
`--config.topology=here` uses the local devices. A mesh takes about a minute to compile. Other
meshes: --config.meshes="({'data': 16, 'fsdp': 16},)".
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import MeshSpec, arguments, section
from particlejax.config.job_specs import PlanSpec


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny' (the tiny quickstart on the local devices)."""
    if arguments(arg, "tiny")["tiny"]:
        meshes = (section(MeshSpec, data=1, fsdp=-1),)
        return ConfigDict(
            section(PlanSpec, experiment="experiments/quickstart.py:tiny", meshes=meshes)
        )
    return ConfigDict(
        section(
            PlanSpec,
            experiment="experiments/pretrain/videomae_base.py",
            topology="v5e:4x4",
            per_device_batch_size=32,
        )
    )
