# SPDX-License-Identifier: Apache-2.0
"""VideoMAE ViT-B or ViT-g at the published sizes: 16 frames of 224 x 224.

    python -m particlejax.main --config experiments/pretrain/videomae_base.py \
        --config.data.source=folder:PATH

ViT-B is of arXiv:2203.12602; `:giant` is ViT-g (arXiv:2303.16727). To plan a run on a pod:
`--config experiments/plan.py --config.experiment=experiments/pretrain/videomae_base.py`.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    DataSpec,
    Experiment,
    MeshSpec,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    arguments,
    section,
)

_BASE = {
    "width": 768,
    "depth": 12,
    "num_heads": 12,
    "decoder_width": 384,
    "decoder_depth": 4,
    "decoder_num_heads": 6,
}
# 40 unrolled layers compile slowly
_GIANT = {
    "width": 1408,
    "depth": 40,
    "num_heads": 16,
    "decoder_width": 512,
    "decoder_depth": 4,
    "decoder_num_heads": 8,
    "unroll_layers": False,
    "remat_policy": "dots",
}
_TINY = {
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "unroll_layers": False,
}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' (ViT-B), 'giant' (ViT-g, patches of 14 x 14) or 'tiny'."""
    args = arguments(arg, "tiny", "giant")
    tiny, side = args["tiny"], 14 if args["giant"] else 16
    # base learning rate 1.5e-4 per 256 clips
    stage = section(
        StageSpec,
        num_steps=4 if tiny else 0,
        num_epochs=0 if tiny else 800,
        batch_size=8 if tiny else 1024,
        val_every_steps=4 if tiny else 5000,
        objectives={
            "masked_autoencoder": {"mask_type": "tube", "mask_ratio": 0.9, "target_ratio": 0.5}
        },  # half of the cubes are decoded, as in VideoMAE V2
        optim=section(OptimSpec, learning_rate=6e-4, warmup_ratio=0.05),
    )
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                num_frames=16,
                image_size=32 if tiny else 224,
                augment={"crop_scale": (0.5, 1.0)},
            ),
            particles=section(
                ParticleSpec, policy="grid", patch_size=(2, 8, 8) if tiny else (2, side, side)
            ),
            model=section(
                ModelSpec,
                dtype="float32" if tiny else "bfloat16",
                **_TINY if tiny else _GIANT if args["giant"] else _BASE,
            ),
            stages={"pretrain": stage},
            mesh=section(MeshSpec, data=1, fsdp=-1)
            if args["giant"] and not tiny
            else section(MeshSpec),
        )
    )
