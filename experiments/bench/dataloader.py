# SPDX-License-Identifier: Apache-2.0
"""Measures the data loader: clip throughput, decoders, random access and memory.

    python -m particlejax.main --config experiments/bench/dataloader.py \
        --config.data.source=folder:PATH

Measures short clips and 1080p videos; takes six to eight minutes on 2 otherwise idle cores.
torchcodec (both seek modes) and decord are measured if they are installed and work.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import DataSpec, ParticleSpec, arguments, section
from particlejax.config.job_specs import BenchJob, BenchSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (the tiny toybox)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            BenchJob,
            job="bench_dataloader",
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                num_frames=16,
                image_size=112,
                decode_short_side=128,
                num_threads=1 if tiny else 2,
                augment={"crop_scale": (0.5, 1.0), "hflip_prob": 0.5},
            ),
            particles=section(ParticleSpec, patch_size=(2, 16, 16)),
            bench=section(BenchSpec, repetitions=1, num_clips=16, batch_size=8, memory_clips=80)
            if tiny
            else section(BenchSpec),
        )
    )
