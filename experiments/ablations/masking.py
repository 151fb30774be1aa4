# SPDX-License-Identifier: Apache-2.0
"""Compares masks for pretraining by fine-tuning the quickstart on a quarter of the labels.

    python -m particlejax.main --config experiments/ablations/masking.py --workdir runs/masking

experiments/ablations/README.md has the table. A run takes about eight minutes on 2 cores.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import SweepSpec

HERE = Path(__file__).parent


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the changed settings of each run."""

    def masked(**more: Any) -> dict[str, Any]:
        return {"stages": {"pretrain": {"objectives": {"masked_autoencoder": more}}}}

    yield "random-40", {}
    yield "random-20", masked(mask_ratio=0.8)
    yield "random-60", masked(mask_ratio=0.4)
    yield "tube-40", masked(mask_type="tube")
    yield "normalised-40", masked(norm_pix_loss=True)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (one run of the tiny toybox)."""
    tiny = arguments(arg, "tiny")["tiny"]
    config = runpy.run_path(str(HERE.parent / "quickstart.py"))["get_config"](arg)
    runs = dict(sweep())
    if tiny:
        runs = {"tube-40": runs["tube-40"]}
    config.job = "sweep"
    config.sweep = ConfigDict(
        section(
            SweepSpec, runs=runs, seeds=(0,) if tiny else (0, 1, 2), metric="finetune/test/top1"
        )
    )
    return config
