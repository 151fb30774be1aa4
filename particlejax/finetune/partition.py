# SPDX-License-Identifier: Apache-2.0
"""Splits parameters into trainable ones, with optimizer state, and frozen ones.

Trainable base parameters keep their paths; parameters added by a method are under 'extra'.
"""

import re
from typing import Any

import jax
from jax import Array

from particlejax.config.training import FinetuneSpec
from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.finetune import peft

_EXTRA = "extra/"
_KEY = 0x7E4E  # separates the random key of new parameters from the model's


def split(spec: FinetuneSpec, params: Params, key: Array) -> tuple[Params, Params | tuple[()]]:
    """(trained, frozen) parameters of a model; frozen is () if all train.

    With `method='full'`, parameters matched by `freeze` are in `trained` too, so that checkpoints
    are complete: `merge` stops their gradient and the optimizer skips them. Raises UserError if
    `freeze` matches nothing.
    """
    method, flat = peft.METHODS[spec.method], tree.flatten(params)
    if spec.freeze and not any(is_frozen(spec, name) for name in flat):
        raise UserError(
            f"finetune.freeze={spec.freeze!r} matches no parameter: write it like "
            "'payload_vision/network'."
        )
    if spec.method == "full":
        return params, ()
    trainable = [
        name
        for name in flat
        if (
            re.search(method.trainable, name)
            or spec.extra_trainable
            and re.search(spec.extra_trainable, name)
        )
        and not is_frozen(spec, name)
    ]
    extra = method.init(jax.random.fold_in(key, _KEY), flat, spec)
    trained = {name: flat[name] for name in trainable} | {
        _EXTRA + name: leaf for name, leaf in extra.items()
    }
    return tree.nest(trained), tree.nest(
        {name: leaf for name, leaf in flat.items() if name not in trained}
    )


def merge(spec: FinetuneSpec, trained: Params, frozen: Params | tuple[()]) -> Params:
    """The model's parameters: pure, differentiable in `trained`."""
    if spec.method == "full":
        if not spec.freeze:
            return trained
        return tree.map_named(
            lambda name, leaf: jax.lax.stop_gradient(leaf) if is_frozen(spec, name) else leaf,
            trained,
        )
    flat = tree.flatten(trained)
    extra = {
        name.removeprefix(_EXTRA): leaf for name, leaf in flat.items() if name.startswith(_EXTRA)
    }
    return tree.nest(peft.METHODS[spec.method].merge(_base_flat(trained, frozen), extra, spec))


def is_frozen(spec: FinetuneSpec, name: str) -> bool:
    """Whether `freeze` matches this path."""
    return bool(spec.freeze and re.search(spec.freeze, name))


def count_trainable(spec: FinetuneSpec, trained: Params) -> int:
    """Number of scalars that really train among those that `split` calls trained."""
    if spec.method != "full":
        return tree.count(trained)
    return sum(
        leaf.size for name, leaf in tree.flatten(trained).items() if not is_frozen(spec, name)
    )


def base_params(trained: Params, frozen: Params | tuple[()]) -> Params:
    """The model's own parameters, without those that the method adds."""
    return tree.nest(_base_flat(trained, frozen))


def _base_flat(trained: Params, frozen: Any) -> dict[str, Any]:
    base = {
        name: leaf for name, leaf in tree.flatten(trained).items() if not name.startswith(_EXTRA)
    }
    return {**tree.flatten(frozen), **base}


def replace_values(
    trained: Params, frozen: Params | tuple[()], start: Params
) -> tuple[Params, Params | tuple[()]]:
    """Parameters with the values of `start` where it has them; added parameters stay."""
    flat = tree.flatten(start)
    new_trained, new_frozen = (
        tree.map_named(lambda name, leaf: flat.get(name, leaf), params)
        for params in (trained, frozen)
    )
    return new_trained, new_frozen
