# SPDX-License-Identifier: Apache-2.0
"""Initializes parameters from another run: params -> params, and a report of what was loaded."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from particlejax.config import renames
from particlejax.config.fields import as_dict, make
from particlejax.config.training import FinetuneSpec
from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.distributed import checkpoint
from particlejax.finetune import partition, peft

# checkpoint metadata: the base run of a checkpoint without frozen parameters
BASE_KEY = "base"
_BRANCHES = ("average", "params")  # keys of a saved state; the first one present is used


def from_checkpoint(params: Params, folder: Path, step: int | None = None) -> tuple[Params, str]:
    """`params` with every leaf that the checkpoint has under the same path, and a sentence about
    the rest.

    Uses the newest complete checkpoint, or that of `step`, and its EMA if one was kept. A
    checkpoint of fine-tuned parameters alone is merged with its base, adapters and prefixes
    included. Raises UserError if the encoder's paths or shapes differ, or if the base has changed.
    """
    base_reference = checkpoint.load_data(folder).get(BASE_KEY)
    if base_reference is None:
        return _from_full_checkpoint(params, folder, step)
    spec, base_dir = _tuning(base_reference), base_folder(folder, base_reference)
    params, summary = from_checkpoint(params, base_dir)
    param_shapes = _shapes(params)
    template, frozen = jax.eval_shape(
        lambda p: partition.split(spec, p, jax.random.key(0)), param_shapes
    )
    model_sharding = next(iter(tree.flatten(param_shapes).values())).sharding
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=_sharding_of(name, param_shapes, model_sharding)
        )
        for name, leaf in tree.flatten(template).items()
    }
    restored, shapes = checkpoint.load_subtree(folder, wanted, _BRANCHES, step)
    flat = tree.flatten(params)
    trained = tree.nest({name: restored.get(name, flat.get(name)) for name in wanted})
    frozen_params = tree.nest({name: flat[name] for name in tree.flatten(frozen)})
    missing = [name for name in wanted if name not in restored]
    _check_missing(missing, wanted, shapes, folder)
    return partition.merge(
        spec, trained, frozen_params
    ), f"{_summary(folder, restored, missing, [])} ({spec.method}); base: {summary}"


def _tuning(own: dict[str, Any]) -> FinetuneSpec:
    """The finetune settings of the checkpoint that a `reference` describes."""
    if "tune" in own:  # format 1
        return make(FinetuneSpec, renames.upgrade(FinetuneSpec, own["tune"]), "finetune")
    return make(FinetuneSpec, own["finetune"], "finetune")


def reference(base: Path, folder: Path, spec: FinetuneSpec) -> dict[str, Any]:
    """Reference of a checkpoint in `folder` to its base run, or none if it holds all parameters."""
    return {
        "finetune": as_dict(spec),
        "folder": os.path.relpath(base.absolute(), folder.absolute()),
        "mark": checkpoint.fingerprint(base),
    }


def base_folder(folder: Path, base_reference: dict[str, Any]) -> Path:
    """The base checkpoints of a `reference`. Raises UserError if they are missing or changed."""
    base = Path(os.path.normpath(folder.absolute() / base_reference["folder"]))
    if not base.is_dir():
        raise UserError(
            f"checkpoint {folder} builds on {base}, which does not exist: restore that run to "
            "its place."
        )
    if checkpoint.fingerprint(base) != base_reference["mark"]:
        raise UserError(
            f"checkpoint {folder} builds on {base}, which has been trained since: restore the "
            "previous state, or fine-tune again in a new --workdir."
        )
    return base


def _from_full_checkpoint(params: Params, folder: Path, step: int | None) -> tuple[Params, str]:
    wanted = tree.flatten(_shapes(params))
    restored, shapes = checkpoint.load_subtree(folder, wanted, _BRANCHES, step)
    missing = [name for name in wanted if name not in restored]
    _check_missing(missing, wanted, shapes, folder)
    if any(
        name.startswith((peft.PEFT_PREFIX, peft.PROMPT_PREFIX)) and name not in wanted
        for name in shapes
    ):
        raise UserError(
            f"checkpoint {folder} has adapters, prefixes or prompts in its encoder, which "
            "this model would ignore: set config.stages.*.finetune.method as in that run."
        )
    unused = sorted({name.split("/")[0] for name in shapes if name not in restored})
    merged = tree.map_named(lambda name, leaf: restored.get(name, leaf), params)
    return merged, _summary(folder, restored, missing, unused)


def _check_missing(
    missing: list[str], wanted: dict[str, Any], shapes: dict[str, tuple], folder: Path
) -> None:
    """Raises UserError if a part is missing that only a run with the same encoder has."""
    if "encoder/modality/token" in shapes:
        raise UserError(
            f"checkpoint {folder} is of an older version, which kept the vectors of all "
            "modalities in one table: use it with that version, or train it again."
        )
    for name in missing:
        if name.startswith("encoder/"):  # all other parameters may be specific to a stage
            stored = f"shape {shapes[name]}" if name in shapes else "nothing"
            raise UserError(
                f"checkpoint {folder} has {stored} for {name} but this model has "
                f"{tuple(wanted[name].shape)}: set config.model, config.particles and "
                "config.data as in that run."
            )


def _shapes(params: Params) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )


def _sharding_of(name: str, param_shapes: Params, model_sharding: Any) -> Any:
    """Sharding of a leaf: that of the model's leaf of the same path, or replicated if there is
    none.
    """
    leaf = tree.flatten(param_shapes).get(name)
    return (
        leaf.sharding if leaf is not None else NamedSharding(model_sharding.mesh, PartitionSpec())
    )


def _summary(folder: Path, restored: dict[str, Any], missing: list[str], unused: list[str]) -> str:
    initialized = sorted({name.split("/")[0] for name in missing})
    text = f"{len(restored)} arrays from {folder}"
    return (
        text
        + (f"; randomly initialized: {', '.join(initialized)}" if initialized else "")
        + (f"; not used: {', '.join(unused)}" if unused else "")
    )
