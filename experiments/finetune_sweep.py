# SPDX-License-Identifier: Apache-2.0
"""Compares fine-tuning methods on a pretrained run, or searches their hyperparameters.

    python -m particlejax.main --config experiments/finetune_sweep.py \
        --config.init_from=RUN_DIR[:STAGE] \
        --config.data.source=folder:PATH --workdir runs/sweep
    python -m particlejax.main \
        --config experiments/finetune_sweep.py:search ...  # pip install -e ".[optuna]"

The first command trains every method below as finetune.py does, each with its own learning rate,
for three seeds; WORKDIR/report.md has the figures. `:search` tries 20 combinations of method,
learning rate, warm-up, final learning rate, weight decay and layer-wise decay with Optuna's TPE.
Settings are selected on `val`: evaluate the best run once on `test` with evaluate.py. Each run
takes as long as finetune.py.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import SweepSpec

HERE = Path(__file__).parent
# learning rates
WAYS = {
    "linear_probe": 3e-3,
    "bitfit": 3e-3,
    "lora": 2e-3,
    "adapter": 2e-3,
    "prefix": 5e-3,
    "vpt_shallow": 5e-3,
    "vpt_deep": 5e-3,
    "ia3": 5e-3,
    "full": 1e-3,
}


def finetune(**more: Any) -> dict[str, Any]:
    """Overrides of the stage `finetune`."""
    return {"stages": {"finetune": more}}


def ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the changed settings of each run."""
    for how, rate in WAYS.items():
        yield how, finetune(finetune={"method": how}, optim={"learning_rate": rate})
    yield "full-decay", finetune(finetune={"layer_decay": 0.7}, optim={"learning_rate": 2e-3})
    yield (
        "full-unfreeze",
        finetune(finetune={"gradual_unfreeze_fraction": 0.5}, optim={"learning_rate": 1e-3}),
    )


def space() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every value of each searched setting."""
    for how in WAYS:
        yield f"method-{how}", finetune(finetune={"method": how})
    for name, values in (
        ("learning_rate", (3e-4, 1e-3, 3e-3, 1e-2)),
        ("warmup_ratio", (0.0, 0.1, 0.3)),
        ("final_lr_ratio", (0.01, 0.1, 1.0)),
        ("weight_decay", (0.0, 0.05, 0.2)),
    ):
        for i, value in enumerate(values):
            yield f"{name}-{i}", finetune(optim={name: value})
    for i, value in enumerate((0.6, 0.8, 1.0)):
        yield f"layer_decay-{i}", finetune(finetune={"layer_decay": value})


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '', 'search' or 'tiny' (one method on the tiny toybox)."""
    args = arguments(arg, "tiny", "search")
    tiny = args["tiny"]
    config = runpy.run_path(str(HERE / "finetune.py"))["get_config"]("tiny" if tiny else "")
    runs = dict(space() if args["search"] else ways())
    if tiny:
        runs = {"lora": runs["lora"]} if not args["search"] else runs
    config.job = "sweep"
    config.sweep = ConfigDict(
        section(
            SweepSpec,
            runs=runs,
            seeds=(0,) if tiny or args["search"] else (0, 1, 2),
            metric="finetune/val/top1",
            num_trials=(1 if tiny else 20) if args["search"] else 0,
        )
    )
    return config
