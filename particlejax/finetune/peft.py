# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient fine-tuning: each method is a pair of pure functions, (key, base) -> extra
and (base, extra) -> params.

Both use flat trees {path name: array}. Only the encoder's blocks change; they are stacked, [depth,
...]. Legend: N depth, D width, H heads, K width of a head, F hidden width of the MLP, R rank, Z
size.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from particlejax.config.training import FinetuneSpec
from particlejax.core.typing import UserError

Flat = Mapping[str, Array]
BLOCKS = "encoder/transformer/blocks/"
# where nn/transformer.py looks for additional parameters of its blocks
TUNED = "encoder/transformer/tuned/"
PROMPTS = (
    "encoder/prompts/"  # where models/particle_model.py looks for additional tokens of every clip
)
_DEEP = f"{TUNED}prompt/token"
_EPSILON = 1e-6  # as in linen's norms
_STD = 0.02  # of new vectors, as for the model's own


class Method(NamedTuple):
    """trains: paths of trainable base parameters. init(key, base, spec): new arrays. merge(base,
    extra, spec): the model's parameters.
    """

    trains: str
    init: Callable[[Array, Flat, FinetuneSpec], dict[str, Array]]
    merge: Callable[[Flat, Flat, FinetuneSpec], dict[str, Array]]


def no_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Adds no parameters."""
    del key, base, spec
    return {}


def beside(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Adds the new parameters beside the base: the blocks find them by name."""
    del spec
    return {**base, **extra}


def lora_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """For each kernel that `target_modules` matches, `a` [N, in, R] random and `b` [N, R, out]
    zero. Raises UserError if none matches.
    """
    names = [
        name for name in base if name.startswith(BLOCKS) and re.search(spec.target_modules, name)
    ]
    if not names:
        raise UserError(
            f"finetune.target_modules={spec.target_modules!r} matches no kernel of the "
            "encoder's blocks: write it like 'attention/(query|value)/kernel$' or "
            "'mlp/(up|down)/kernel$'."
        )
    extra = {}
    for name, each in zip(names, jax.random.split(key, len(names)), strict=True):
        depth, inputs, outputs = _sides(name, base[name].shape)
        extra[f"{name}/a"] = jax.random.normal(each, (depth, inputs, spec.lora_rank)) * inputs**-0.5
        extra[f"{name}/b"] = jnp.zeros((depth, spec.lora_rank, outputs))
    return extra


def lora_merge(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """kernel + alpha / rank a b (LoRA, arXiv:2106.09685)."""
    merged = dict(base)
    for name in (path.removesuffix("/a") for path in extra if path.endswith("/a")):
        change = jnp.einsum("nir,nro->nio", extra[f"{name}/a"], extra[f"{name}/b"]) * (
            spec.lora_alpha / spec.lora_rank
        )
        merged[name] = base[name] + change.reshape(base[name].shape)
    return merged


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Depth, inputs and outputs of a stacked kernel: [N, D, H, K], but [N, H, K, D] for attention's
    output.
    """
    inputs = 2 if name.endswith("attention/out/kernel") else 1
    return shape[0], math.prod(shape[1 : 1 + inputs]), math.prod(shape[1 + inputs :])


def ia3_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Factors minus one, initially zero, of keys and values [N, H, K] and of the MLP's hidden
    values [N, F].
    """
    del key, spec
    heads = {
        f"{BLOCKS}attention/{part}": base[f"{BLOCKS}attention/{part}/bias"].shape
        for part in ("key", "value")
    }
    hidden = {f"{BLOCKS}mlp/down": base[f"{BLOCKS}mlp/down/kernel"].shape[:2]}
    return {f"{name}/factor": jnp.zeros(shape) for name, shape in (heads | hidden).items()}


def ia3_merge(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Scales keys, values and hidden values (IA3, arXiv:2205.05638), folded into kernels and
    biases.
    """
    del spec
    merged = dict(base)
    for part in ("key", "value"):
        name = f"{BLOCKS}attention/{part}"
        factor = 1 + extra[f"{name}/factor"]
        merged[f"{name}/kernel"] = base[f"{name}/kernel"] * factor[:, None]
        merged[f"{name}/bias"] = base[f"{name}/bias"] * factor
    name = f"{BLOCKS}mlp/down"
    merged[f"{name}/kernel"] = base[f"{name}/kernel"] * (1 + extra[f"{name}/factor"])[:, :, None]
    return merged


def adapter_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Adapters after attention and after the MLP: Dense to [N, Z], GELU, Dense back (initially
    zero).
    """
    depth, width = base[f"{BLOCKS}mlp/down/bias"].shape
    extra = {}
    for name, each in zip(("attention_adapter", "mlp_adapter"), jax.random.split(key), strict=True):
        extra[f"{TUNED}{name}/down/kernel"] = (
            jax.random.normal(each, (depth, width, spec.adapter_dim)) * width**-0.5
        )
        extra[f"{TUNED}{name}/down/bias"] = jnp.zeros((depth, spec.adapter_dim))
        extra[f"{TUNED}{name}/up/kernel"] = jnp.zeros((depth, spec.adapter_dim, width))
        extra[f"{TUNED}{name}/up/bias"] = jnp.zeros((depth, width))
    return extra


def prefix_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Prefix keys and values [N, Z, H, K] that every token may read in addition to its own
    clip's.
    """
    depth, heads, width = base[f"{BLOCKS}attention/key/bias"].shape
    keys = zip(("key", "value"), jax.random.split(key), strict=True)
    return {
        f"{TUNED}attention/prefix/{name}": jax.random.normal(
            each, (depth, spec.num_virtual_tokens, heads, width)
        )
        * _STD
        for name, each in keys
    }


def prompt_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Shallow prompts: tokens [Z, D] that pass through the blocks with those of every clip."""
    width = base[f"{BLOCKS}mlp/down/bias"].shape[-1]
    return {f"{PROMPTS}token": jax.random.normal(key, (spec.num_virtual_tokens, width)) * _STD}


def prompt_deep_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Deep prompts [N, Z, D]: each block has its own tokens."""
    return {
        _DEEP: jax.random.normal(
            key,
            (
                *base[f"{BLOCKS}mlp/down/bias"].shape[:1],
                spec.num_virtual_tokens,
                base[f"{BLOCKS}mlp/down/bias"].shape[1],
            ),
        )
        * _STD
    }


def prompt_deep_merge(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Keys and values of deep prompts: a block discards the prompts' outputs, so nothing else
    matters.
    """
    del spec
    norm = (
        _normed(extra[_DEEP]) * base[f"{BLOCKS}attention_norm/scale"][:, None]
        + base[f"{BLOCKS}attention_norm/bias"][:, None]
    )
    merged = dict(base)
    for name in ("key", "value"):
        kernel, bias = (base[f"{BLOCKS}attention/{name}/{leaf}"] for leaf in ("kernel", "bias"))
        merged[f"{TUNED}attention/prefix/{name}"] = (
            jnp.einsum("nzd,ndhk->nzhk", norm, kernel) + bias[:, None]
        )
    if f"{BLOCKS}attention/key_norm/scale" in base:
        key = merged[f"{TUNED}attention/prefix/key"]
        root = jnp.sqrt(jnp.mean(jnp.square(key), axis=-1, keepdims=True) + _EPSILON)
        merged[f"{TUNED}attention/prefix/key"] = (
            key / root * base[f"{BLOCKS}attention/key_norm/scale"][:, None, None]
        )
    return merged


def _normed(x_NZD: Array) -> Array:
    """Normalized to mean 0 and variance 1, like linen's LayerNorm."""
    return (x_NZD - x_NZD.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(
        x_NZD.var(axis=-1, keepdims=True) + _EPSILON
    )


_TASK = r"^(?!encoder/)"
TABLE: dict[str, Method] = {
    "full": Method("", no_init, beside),
    "linear_probe": Method(_TASK, no_init, beside),
    "attentive_probe": Method(_TASK, no_init, beside),
    "bitfit": Method(f"{_TASK}|/bias$", no_init, beside),
    "lora": Method(_TASK, lora_init, lora_merge),
    "ia3": Method(_TASK, ia3_init, ia3_merge),
    "adapter": Method(_TASK, adapter_init, beside),
    "prefix": Method(_TASK, prefix_init, beside),
    "vpt_shallow": Method(_TASK, prompt_init, beside),
    "vpt_deep": Method(_TASK, prompt_deep_init, prompt_deep_merge),
}
