# SPDX-License-Identifier: Apache-2.0
"""Parameters in two: those that train, which alone have an optimiser state and are saved, and those
that stay as they came.

Trained ones of the base keep their paths; what a method adds stands under 'extra'.
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
_KEY = 0x7E4E  # tells the draw of new parameters from the model's own


def split(spec: FinetuneSpec, params: Params, key: Array) -> tuple[Params, Params | tuple[()]]:
    """(trained, frozen) of the parameters of a model; frozen is () where all train.

    Where `how` is full, what `freeze` names stands among the trained ones all the same, so that
    checkpoints are whole: `whole` cuts its gradient and the optimiser passes it over. Raises
    UserError where it names nothing.
    """
    method, flat = peft.TABLE[spec.method], tree.flatten(params)
    if spec.freeze and not any(still(spec, name) for name in flat):
        raise UserError(
            f"finetune.freeze={spec.freeze!r} names no parameter: write it like "
            "'payload_vision/network'."
        )
    if spec.method == "full":
        return params, ()
    trains = [
        name
        for name in flat
        if (
            re.search(method.trains, name)
            or spec.extra_trainable
            and re.search(spec.extra_trainable, name)
        )
        and not still(spec, name)
    ]
    extra = method.init(jax.random.fold_in(key, _KEY), flat, spec)
    trained = {name: flat[name] for name in trains} | {
        _EXTRA + name: leaf for name, leaf in extra.items()
    }
    return tree.nest(trained), tree.nest(
        {name: leaf for name, leaf in flat.items() if name not in trained}
    )


def whole(spec: FinetuneSpec, trained: Params, frozen: Params | tuple[()]) -> Params:
    """The parameters that the model reads: pure, differentiable in `trained`."""
    if spec.method == "full":
        if not spec.freeze:
            return trained
        return tree.map_named(
            lambda name, leaf: jax.lax.stop_gradient(leaf) if still(spec, name) else leaf, trained
        )
    flat = tree.flatten(trained)
    extra = {
        name.removeprefix(_EXTRA): leaf for name, leaf in flat.items() if name.startswith(_EXTRA)
    }
    return tree.nest(peft.TABLE[spec.method].merge(_base(trained, frozen), extra, spec))


def still(spec: FinetuneSpec, name: str) -> bool:
    """Whether `freeze` names this path."""
    return bool(spec.freeze and re.search(spec.freeze, name))


def training(spec: FinetuneSpec, trained: Params) -> int:
    """How many numbers train of those that `split` calls trained."""
    if spec.method != "full":
        return tree.count(trained)
    return sum(leaf.size for name, leaf in tree.flatten(trained).items() if not still(spec, name))


def base(trained: Params, frozen: Params | tuple[()]) -> Params:
    """The model's own parameters, without what the method adds."""
    return tree.nest(_base(trained, frozen))


def _base(trained: Params, frozen: Any) -> dict[str, Any]:
    own = {
        name: leaf for name, leaf in tree.flatten(trained).items() if not name.startswith(_EXTRA)
    }
    return {**tree.flatten(frozen), **own}


def rebased(
    trained: Params, frozen: Params | tuple[()], start: Params
) -> tuple[Params, Params | tuple[()]]:
    """Both with the values of `start` where it has any: what the method adds stays."""
    flat = tree.flatten(start)
    one, other = (
        tree.map_named(lambda name, leaf: flat.get(name, leaf), each) for each in (trained, frozen)
    )
    return one, other
