# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of each collective in VideoMAE-B's train step for 1 to 512 TPU chips.

    python -m particlejax.main --config experiments/bench/scaling.py

No TPU is needed, but its compiler is: `pip install -e ".[plan]"`. A mesh takes two to four minutes
on one core; the same command resumes. Layers run in a loop, which compiles faster and has the same
collectives. For ViT-g:
--config.experiment=experiments/pretrain/videomae_base.py:giant --config.per_device_batch_size=8.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import MeshSpec, arguments, section
from particlejax.config.job_specs import PlanSpec

_TINY = (
    "stages.pretrain.batch_size=8",
    "model.unroll_layers=False",
    "model.width=16",
    "model.depth=1",
    "model.decoder_depth=1",
)


def get_config(arg: str = "") -> ConfigDict:
    """The job; arg: '' or 'tiny' (the tiny quickstart on one and on all local devices)."""
    fsdp = section(MeshSpec, data=1, fsdp=-1)
    if arguments(arg, "tiny")["tiny"]:
        return ConfigDict(
            section(
                PlanSpec,
                job="bench_scaling",
                experiment="experiments/quickstart.py:tiny",
                overrides=_TINY,
                topology="here:1,here",
                meshes=(fsdp,),
            )
        )
    return ConfigDict(
        section(
            PlanSpec,
            job="bench_scaling",
            experiment="experiments/pretrain/videomae_base.py",
            topology="v5p:1x1x1,v5p:2x2x1,v5p:2x2x4,v5p:4x4x4,v5p:4x8x8,v5p:8x8x8",
            per_device_batch_size=32,
            overrides=("model.unroll_layers=False",),
            meshes=(section(MeshSpec), fsdp),
        )
    )
