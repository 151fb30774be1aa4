# SPDX-License-Identifier: Apache-2.0
"""Measures train steps and inference against VideoMAE of `transformers` on torch.

    python -m particlejax.main --config experiments/bench/videomae.py
    python -m particlejax.main --config experiments/bench/videomae.py:large \
        --config.model.unroll_layers=False --config.bench.num_clips=160

Measures particlejax on the same tokens and on half as many adaptive particles, in float32 and,
where it is faster, bfloat16, also as a fraction of the machine's matmul rate. Takes five minutes on
2 otherwise idle cores, mostly compilation. The second command is for a GPU: set
XLA_PYTHON_CLIENT_PREALLOCATE=false, so that torch gets memory. Without torch and transformers
(`pip install -e ".[peers]"`) only particlejax is measured. `:base` and `:large` have VideoMAE's
sizes, at 224 pixels.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    DataSpec,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    arguments,
    section,
)
from particlejax.config.job_specs import BenchJob, BenchSpec

# (width, depth, heads) of encoder and decoder (arXiv:2203.12602, appendix)
_SIZES = {
    "tiny": (32, 1, 2, 16, 1, 1),
    "small": (384, 12, 6, 192, 4, 3),
    "base": (768, 12, 12, 384, 4, 6),
    "large": (1024, 24, 16, 512, 12, 8),
}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: 'small' (also ''), 'base', 'large' or 'tiny'."""
    args = arguments(arg, *_SIZES)
    size = next((name for name, given in args.items() if given), "small")
    tiny, names = (
        size == "tiny",
        ("width", "depth", "num_heads", "decoder_width", "decoder_depth", "decoder_num_heads"),
    )
    optim = section(OptimSpec, learning_rate=1e-4, grad_clip_norm=0.0)
    return ConfigDict(
        section(
            BenchJob,
            job="bench_videomae",
            data=section(
                DataSpec, num_frames=16, image_size={"tiny": 32, "small": 112}.get(size, 224)
            ),
            particles=section(
                ParticleSpec, policy="grid", patch_size=(2, 16, 16), split_axes=("time",)
            ),  # 112 is not a multiple of 32
            model=section(
                ModelSpec, distance_bias=False, **dict(zip(names, _SIZES[size], strict=True))
            ),  # as VideoMAE's attention
            stages={
                "pretrain": section(
                    StageSpec,
                    num_steps=100,
                    batch_size=8,
                    optim=optim,
                    objectives={
                        "masked_autoencoder": {
                            "mask_type": "tube",
                            "mask_ratio": 0.9,
                            "target_ratio": 0.9,
                        }
                    },
                ),
                "finetune": section(
                    StageSpec, num_steps=100, batch_size=8, optim=optim, objectives={"classify": {}}
                ),
            },
            stage_order=("finetune",) if tiny else ("pretrain", "finetune"),
            bench=(
                section(BenchSpec, repetitions=1, num_clips=8, dtypes=("float32",))
                if tiny
                else section(BenchSpec, repetitions=5, num_clips=8)
            ),
        )
    )
