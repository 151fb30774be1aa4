# SPDX-License-Identifier: Apache-2.0
"""One objective by itself, each with the same encoder and, but for order and transform, as many
clips: what does it teach?

    python -m particlejax.main --config experiments/pretrain/one.py:sync --workdir runs/one-sync
    python -m particlejax.main --config experiments/probe.py --config.run=runs/one-sync \
        --workdir runs/one-sync-probe

The argument names the objective; README.md has the table. `sync` correlates sight and sound,
`asked` reads both and is asked for the shift, `frames` is synchrony of the picture's halves,
`views` contrast of two masked views of one clip, `hard` matching with negatives drawn by likeness,
`codes` visual words. 64 particles a clip: cuboids of 4x4 pixels that last as long as the clip, or,
for what asks about moments, of 8x8 pixels and a quarter of it; for `sync` 128 of an eighth.
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
ONE = {  # what the encoder is given, the objective and its settings
    "masked": (SEEN, "masked", {"mask": "tube", "keep": 0.25, "predict": 0.5}),
    "latent": (SEEN, "latent", {"mask": "tube", "keep": 0.25, "predict": 0.5}),
    "next_frame": (SEEN, "next_frame", {"target": "change"}),
    "order": (SEEN, "order", {}),
    "speed": (SEEN, "speed", {}),
    "arrow": (SEEN, "arrow", {}),
    "transform": (SEEN, "transform", {}),
    "align": (SEEN, "align", {"modality": "vision"}),
    "frames": (SEEN, "sync", {"pair": ("vision", "vision"), "shifts": 1, "step": 1}),
    "views": (SEEN, "contrast", {"pair": ("vision", "vision"), "keep": 0.4}),
    "sync": (HEARD, "sync", {"shifts": 2, "step": 3, "other": 0.0, "how": "correlation"}),
    "asked": (HEARD, "sync", {"shifts": 2, "step": 3, "other": 0.0}),
    "hear": (HEARD, "contrast", {"pair": ("vision", "audio")}),
    "contrast": (READ, "contrast", {"pair": ("vision", "text")}),
    "match": (READ, "match", {}),
    "hard": (READ, "match", {"negatives": "hard"}),
    "words": (READ, "words", {}),
    "codes": (READ, "visual_words", {"mask": "tube", "keep": 0.25, "predict": 0.5, "codes": 64}),
}
BASES = {  # of what asks what comes when, so that cuboids must be shorter than the clip
    **{name: (4, 8, 8) for name in ("next_frame", "order", "speed", "align", "frames")},
    "sync": (2, 8, 8),
}
LONGER = {"order": 3, "transform": 3}  # times as many steps, where less stays at chance


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: a name of `ONE`, masked where there is none, and 'tiny'."""
    args = arguments(arg, "tiny", *ONE)
    tiny = args["tiny"]
    name = next((name for name in ONE if args[name]), "masked")
    modalities, objective, settings = ONE[name]
    stage = section(
        StageSpec,
        steps=4 if tiny else 1200 * LONGER.get(name, 1),
        rows=8 if tiny else 16,
        val_every=0,
        ema=0.99,
        objectives={objective: settings},
        optim=section(OptimSpec, rate=1e-3),
    )
    still = 0.4 if name == "next_frame" else 0.05
    size = {"width": 64, "depth": 3, "heads": 2}
    if tiny:
        size = {"width": 24, "depth": 2, "heads": 2, "decoder_width": 24, "unroll": False}
    return ConfigDict(
        section(
            Experiment,
            data=section(
                DataSpec,
                source="toybox:tiny" if tiny else "toybox",
                modalities=modalities,
                frames=16,
                size=32,
                still=still,
                memory_gib=1.0,
                audio=section(AudioSpec, patch=(8, 64), seconds=2.0),
            ),
            particles=section(ParticleSpec, policy="grid", base=BASES.get(name, (16, 4, 4))),
            model=section(ModelSpec, **size),
            stages={"pretrain": stage},
        )
    )
