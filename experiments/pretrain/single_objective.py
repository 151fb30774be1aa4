# SPDX-License-Identifier: Apache-2.0
"""Pretrains the same encoder with one objective, named by the argument.

    python -m particlejax.main \
        --config experiments/pretrain/single_objective.py:sync_correlation --workdir runs/one-sync
    python -m particlejax.main --config experiments/probe.py --config.run=runs/one-sync \
        --workdir runs/one-sync-probe

experiments/pretrain/README.md has the table. `sync_correlation` correlates video and audio,
`sync_joint` encodes both together, `sync_halves` synchronizes two halves of the picture,
`contrastive_views` compares two masked views of a clip, `matching_hard` samples hard negatives,
`visual_tokens` is masked_visual_tokens. All see as many clips, except that clip_order and
rotation_flip see three times as many. A clip has 64 particles: cuboids of 4x4 pixels as long as the
clip, or for temporal objectives 8x8 pixels and a quarter of it; `sync_correlation` has 128.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import (
    AudioSpec,
    DataSpec,
    Experiment,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StageSpec,
    arguments,
    section,
)

SEEN, HEARD, READ = ("vision",), ("vision", "audio"), ("vision", "text")
ONE = {  # name: (modalities, objective, its settings)
    "masked_autoencoder": (
        SEEN,
        "masked_autoencoder",
        {"mask_type": "tube", "mask_ratio": 0.75, "target_ratio": 0.5},
    ),
    "jepa": (SEEN, "jepa", {"mask_type": "tube", "mask_ratio": 0.75, "target_ratio": 0.5}),
    "future_prediction": (SEEN, "future_prediction", {"target": "residual"}),
    "clip_order": (SEEN, "clip_order", {}),
    "playback_speed": (SEEN, "playback_speed", {}),
    "arrow_of_time": (SEEN, "arrow_of_time", {}),
    "rotation_flip": (SEEN, "rotation_flip", {}),
    "temporal_alignment": (SEEN, "temporal_alignment", {"modality": "vision"}),
    "sync_halves": (
        SEEN,
        "synchronization",
        {"modalities": ("vision", "vision"), "max_shift": 1, "shift_stride": 1},
    ),
    "sync_correlation": (
        HEARD,
        "synchronization",
        {"max_shift": 2, "shift_stride": 3, "mismatch_prob": 0.0, "method": "correlation"},
    ),
    "sync_joint": (
        HEARD,
        "synchronization",
        {"max_shift": 2, "shift_stride": 3, "mismatch_prob": 0.0},
    ),
    "contrastive_views": (
        SEEN,
        "contrastive",
        {"modalities": ("vision", "vision"), "mask_ratio": 0.6},
    ),
    "contrastive_audio": (HEARD, "contrastive", {"modalities": ("vision", "audio")}),
    "contrastive_text": (READ, "contrastive", {"modalities": ("vision", "text")}),
    "text_matching": (READ, "text_matching", {}),
    "matching_hard": (READ, "text_matching", {"negatives": "hard"}),
    "masked_lm": (READ, "masked_lm", {}),
    "visual_tokens": (
        READ,
        "masked_visual_tokens",
        {"mask_type": "tube", "mask_ratio": 0.75, "target_ratio": 0.5, "codebook_size": 64},
    ),
}
BASES = {  # temporal objectives need cuboids shorter than the clip
    **{
        name: (4, 8, 8)
        for name in (
            "future_prediction",
            "clip_order",
            "playback_speed",
            "temporal_alignment",
            "sync_halves",
        )
    },
    "sync_correlation": (2, 8, 8),
}
LONGER = {"clip_order": 3, "rotation_flip": 3}  # factor of num_steps; fewer stay at chance


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: a name of `ONE` (default masked_autoencoder) and 'tiny'."""
    args = arguments(arg, "tiny", *ONE)
    tiny = args["tiny"]
    name = next((name for name in ONE if args[name]), "masked_autoencoder")
    modalities, objective, settings = ONE[name]
    stage = section(
        StageSpec,
        num_steps=4 if tiny else 1200 * LONGER.get(name, 1),
        batch_size=8 if tiny else 16,
        val_every_steps=0,
        ema_decay=0.99,
        objectives={objective: settings},
        optim=section(OptimSpec, learning_rate=1e-3),
    )
    still = 0.4 if name == "future_prediction" else 0.05
    size = {"width": 64, "depth": 3, "num_heads": 2}
    if tiny:
        size = {
            "width": 24,
            "depth": 2,
            "num_heads": 2,
            "decoder_width": 24,
            "unroll_layers": False,
        }
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                modalities=modalities,
                num_frames=16,
                image_size=32,
                temporal_mean_scale=still,
                ram_cache_gib=1.0,
                audio=section(AudioSpec, patch_size=(8, 64), max_seconds=2.0),
            ),
            particles=section(ParticleSpec, policy="grid", patch_size=BASES.get(name, (16, 4, 4))),
            model=section(ModelSpec, **size),
            stages={"pretrain": stage},
        )
    )
