# SPDX-License-Identifier: Apache-2.0
"""Compares adaptive particles with uniform grids on real clips: error and selection cost.

    python -m particlejax.main --config experiments/bench/particles.py \
        --config.data.source=folder:PATH

Takes four minutes on 2 cores, which should be otherwise idle.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import DataSpec, ModelSpec, ParticleSpec, arguments, section
from particlejax.config.job_specs import BenchJob, BenchSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (the tiny toybox)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            BenchJob,
            job="bench_particles",
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                num_frames=16,
                image_size=64 if tiny else 128,
            ),
            particles=section(ParticleSpec, policy="adaptive", patch_size=(2, 8, 8)),
            model=(
                section(ModelSpec, width=32, depth=1, num_heads=2, unroll_layers=False)
                if tiny
                else section(ModelSpec, width=192, depth=6, num_heads=3)
            ),
            bench=section(BenchSpec, repetitions=1, num_clips=2)
            if tiny
            else section(BenchSpec, repetitions=5, num_clips=30),
        )
    )
