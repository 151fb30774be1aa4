# SPDX-License-Identifier: Apache-2.0
"""Initializes parameters from another run: params -> params, and a report of what was loaded."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
_HEAD = "head/"  # paths of the classification head, whose last axis is the classes
_MAX_NAMES = 5  # class names in a sentence


def from_checkpoint(
    params: Params, folder: Path, step: int | None = None, outputs: tuple[str, ...] | None = None
) -> tuple[Params, str]:
    """`params` with every leaf that the checkpoint has under the same path, and a sentence about
    the rest.

    Uses the newest complete checkpoint, or that of `step`, and its EMA if one was kept. A
    checkpoint of fine-tuned parameters alone is merged with its base, adapters and prefixes
    included. outputs: the class names of the head of `params`; where the checkpoint's are others,
    the head gets the weights of the names in common, and the rest stays as it is. None: the head is
    that of the checkpoint. Raises UserError if the encoder's paths or shapes differ, or if the base
    has changed.
    """
    data = checkpoint.load_data(folder)
    base_reference = data.get(BASE_KEY)
    if base_reference is None:
        return _from_full_checkpoint(params, folder, step, outputs, data)
    spec, base_dir = _tuning(base_reference), base_folder(folder, base_reference)
    params, summary = from_checkpoint(params, base_dir, outputs=outputs)
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
    flat = tree.flatten(params)
    restored, shapes, head = _load(folder, wanted, flat, step, outputs, data)
    trained = tree.nest({name: restored.get(name, flat.get(name)) for name in wanted})
    frozen_params = tree.nest({name: flat[name] for name in tree.flatten(frozen)})
    missing = [name for name in wanted if name not in restored]
    _check_missing(missing, wanted, shapes, folder)
    return partition.merge(
        spec, trained, frozen_params
    ), f"{_summary(folder, restored, missing, [], head)} ({spec.method}); base: {summary}"


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


def _from_full_checkpoint(
    params: Params,
    folder: Path,
    step: int | None,
    outputs: tuple[str, ...] | None,
    data: dict[str, Any],
) -> tuple[Params, str]:
    wanted = tree.flatten(_shapes(params))
    restored, shapes, head = _load(folder, wanted, tree.flatten(params), step, outputs, data)
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
    return merged, _summary(folder, restored, missing, unused, head)


def _load(
    folder: Path,
    wanted: dict[str, Any],
    initial: dict[str, Any],
    step: int | None,
    outputs: tuple[str, ...] | None,
    data: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, tuple], str]:
    """The arrays that `wanted` names, with the head of the classes `outputs` on top of `initial`;
    the shapes of all saved arrays; and what became of a head of other classes.
    """
    if not outputs or tuple(data.get("outputs", ())) == outputs:
        return *checkpoint.load_subtree(folder, wanted, _BRANCHES, step), ""
    others = {name: leaf for name, leaf in wanted.items() if not name.startswith(_HEAD)}
    restored, shapes = checkpoint.load_subtree(folder, others, _BRANCHES, step)
    head = [name for name in wanted if name.startswith(_HEAD) and name in shapes]
    if not head:
        return restored, shapes, ""
    saved = _output_names(data, outputs, shapes[head[0]][-1])
    if not saved or saved == outputs:
        same, _ = checkpoint.load_subtree(folder, {n: wanted[n] for n in head}, _BRANCHES, step)
        by_position = same and not saved
        sentence = "the head by position, as its class names are unknown" if by_position else ""
        return restored | same, shapes, sentence
    common = [name for name in outputs if name in saved]
    if not common:
        return restored, shapes, f"a new head, as no class is one of {_listed(saved)}"
    stored = {
        name: jax.ShapeDtypeStruct(
            shapes[name],
            wanted[name].dtype,
            sharding=NamedSharding(wanted[name].sharding.mesh, PartitionSpec()),
        )
        for name in head
    }
    arrays, _ = checkpoint.load_subtree(folder, stored, _BRANCHES, step)
    new, old = (np.array([names.index(name) for name in common]) for names in (outputs, saved))
    for name in head:
        start = initial[name]
        if isinstance(start, jax.ShapeDtypeStruct):  # as `wanted` of a base run that is merged
            start = jnp.zeros(start.shape, start.dtype)
        restored[name] = jax.jit(
            lambda start, source: start.at[..., new].set(source[..., old]),
            out_shardings=wanted[name].sharding,
        )(start, arrays[name])
    fresh = [name for name in outputs if name not in saved]
    by_name = f"the head by class name for {len(common)} of {len(outputs)} classes"
    return restored, shapes, by_name + (f", new for {_listed(fresh)}" if fresh else "")


def _output_names(data: dict[str, Any], outputs: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The class names of a checkpoint's head of `count` outputs, () if unknown.

    Older versions recorded labels alone, which are the classes, combinations of them ('a|b') or
    numbers.
    """
    if "outputs" in data:
        return tuple(data["outputs"])
    labels = data.get("classes", ())
    parts = sorted({part.strip() for label in labels for part in label.split("|")} - {""})
    candidates = [tuple(names) for names in (labels, parts, ("value",)) if len(names) == count]
    return max(
        candidates, key=lambda names: (len(set(names) & set(outputs)), names == outputs), default=()
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")


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


def _summary(
    folder: Path, restored: dict[str, Any], missing: list[str], unused: list[str], head: str
) -> str:
    initialized = sorted({name.split("/")[0] for name in missing})
    text = f"{len(restored)} arrays from {folder}"
    return (
        text
        + (f"; randomly initialized: {', '.join(initialized)}" if initialized else "")
        + (f"; not used: {', '.join(unused)}" if unused else "")
        + (f"; {head}" if head else "")
    )
