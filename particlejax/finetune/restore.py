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
BASE = "base"
_BRANCHES = ("average", "params")  # keys of a saved state; the first one present is used


def from_checkpoint(params: Params, folder: Path, step: int | None = None) -> tuple[Params, str]:
    """`params` with every leaf that the checkpoint has under the same path, and a sentence about
    the rest.

    Uses the newest complete checkpoint, or that of `step`, and its EMA if one was kept. A
    checkpoint of fine-tuned parameters alone is merged with its base, adapters and prefixes
    included. Raises UserError if the encoder's paths or shapes differ, or if the base has changed.
    """
    own = checkpoint.load_data(folder).get(BASE)
    if own is None:
        return _plain(params, folder, step)
    spec, base = _tuning(own), base_folder(folder, own)
    params, sentence = from_checkpoint(params, base)
    like = _shapes(params)
    template, frozen = jax.eval_shape(lambda p: partition.split(spec, p, jax.random.key(0)), like)
    place = next(iter(tree.flatten(like).values())).sharding
    want = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_beside(name, like, place))
        for name, leaf in tree.flatten(template).items()
    }
    found, shapes = checkpoint.load_subtree(folder, want, _BRANCHES, step)
    flat = tree.flatten(params)
    trained = tree.nest({name: found.get(name, flat.get(name)) for name in want})
    rest = tree.nest({name: flat[name] for name in tree.flatten(frozen)})
    fresh = [name for name in want if name not in found]
    _refuse(fresh, want, shapes, folder)
    return partition.whole(
        spec, trained, rest
    ), f"{_sentence(folder, found, fresh, [])} ({spec.method}); base: {sentence}"


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
        "mark": checkpoint.mark(base),
    }


def base_folder(folder: Path, own: dict[str, Any]) -> Path:
    """The base checkpoints of a `reference`. Raises UserError if they are missing or changed."""
    base = Path(os.path.normpath(folder.absolute() / own["folder"]))
    if not base.is_dir():
        raise UserError(
            f"checkpoint {folder} builds on {base}, which does not exist: restore that run to "
            "its place."
        )
    if checkpoint.mark(base) != own["mark"]:
        raise UserError(
            f"checkpoint {folder} builds on {base}, which has been trained since: restore the "
            "previous state, or fine-tune again in a new --workdir."
        )
    return base


def _plain(params: Params, folder: Path, step: int | None) -> tuple[Params, str]:
    want = tree.flatten(_shapes(params))
    found, shapes = checkpoint.load_subtree(folder, want, _BRANCHES, step)
    fresh = [name for name in want if name not in found]
    _refuse(fresh, want, shapes, folder)
    if any(name.startswith((peft.TUNED, peft.PROMPTS)) and name not in want for name in shapes):
        raise UserError(
            f"checkpoint {folder} has adapters, prefixes or prompts in its encoder, which "
            "this model would ignore: set config.stages.*.finetune.method as in that run."
        )
    unused = sorted({name.split("/")[0] for name in shapes if name not in found})
    merged = tree.map_named(lambda name, leaf: found.get(name, leaf), params)
    return merged, _sentence(folder, found, fresh, unused)


def _refuse(fresh: list[str], want: dict[str, Any], shapes: dict[str, tuple], folder: Path) -> None:
    """Raises UserError if a part is missing that only a run with the same encoder has."""
    if "encoder/modality/token" in shapes:
        raise UserError(
            f"checkpoint {folder} is of an older version, which kept the vectors of all "
            "modalities in one table: use it with that version, or train it again."
        )
    for name in fresh:
        if name.startswith("encoder/"):  # all other parameters may be specific to a stage
            there = f"shape {shapes[name]}" if name in shapes else "nothing"
            raise UserError(
                f"checkpoint {folder} has {there} for {name} but this model has "
                f"{tuple(want[name].shape)}: set config.model, config.particles and "
                "config.data as in that run."
            )


def _shapes(params: Params) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )


def _beside(name: str, like: Params, place: Any) -> Any:
    """Sharding of a leaf: that of the model's leaf of the same path, or replicated if there is
    none.
    """
    known = tree.flatten(like).get(name)
    return known.sharding if known is not None else NamedSharding(place.mesh, PartitionSpec())


def _sentence(folder: Path, found: dict[str, Any], fresh: list[str], unused: list[str]) -> str:
    new = sorted({name.split("/")[0] for name in fresh})
    text = f"{len(found)} arrays from {folder}"
    return (
        text
        + (f"; randomly initialized: {', '.join(new)}" if new else "")
        + (f"; not used: {', '.join(unused)}" if unused else "")
    )
