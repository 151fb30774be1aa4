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
BLOCKS_PREFIX = "encoder/transformer/blocks/"
# where nn/transformer.py looks for additional parameters of its blocks
PEFT_PREFIX = "encoder/transformer/tuned/"
PROMPT_PREFIX = (
    "encoder/prompts/"  # where models/particle_model.py looks for additional tokens of every clip
)
_DEEP_PROMPT = f"{PEFT_PREFIX}prompt/token"
_EPSILON = 1e-6  # as in linen's norms
_STD = 0.02  # of new vectors, as for the model's own


class Method(NamedTuple):
    """trainable: paths of trainable base parameters. init(key, base, spec): new arrays. merge(base,
    extra, spec): the model's parameters.
    """

    trainable: str
    init: Callable[[Array, Flat, FinetuneSpec], dict[str, Array]]
    merge: Callable[[Flat, Flat, FinetuneSpec], dict[str, Array]]


def no_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Adds no parameters."""
    del key, base, spec
    return {}


def add_extra(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Adds the new parameters beside the base: the blocks find them by name."""
    del spec
    return {**base, **extra}


def lora_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """For each kernel that `target_modules` matches, `a` [N, in, R] random and `b` [N, R, out]
    zero. Raises UserError if none matches.
    """
    names = [
        name
        for name in base
        if name.startswith(BLOCKS_PREFIX) and re.search(spec.target_modules, name)
    ]
    if not names:
        raise UserError(
            f"finetune.target_modules={spec.target_modules!r} matches no kernel of the "
            "encoder's blocks: write it like 'attention/(query|value)/kernel$' or "
            "'mlp/(up|down)/kernel$'."
        )
    extra = {}
    for name, subkey in zip(names, jax.random.split(key, len(names)), strict=True):
        depth, inputs, outputs = _kernel_dims(name, base[name].shape)
        extra[f"{name}/a"] = (
            jax.random.normal(subkey, (depth, inputs, spec.lora_rank)) * inputs**-0.5
        )
        extra[f"{name}/b"] = jnp.zeros((depth, spec.lora_rank, outputs))
    return extra


def lora_merge(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """kernel + alpha / rank a b (LoRA, arXiv:2106.09685)."""
    merged = dict(base)
    for name in (path.removesuffix("/a") for path in extra if path.endswith("/a")):
        delta = jnp.einsum("nir,nro->nio", extra[f"{name}/a"], extra[f"{name}/b"]) * (
            spec.lora_alpha / spec.lora_rank
        )
        merged[name] = base[name] + delta.reshape(base[name].shape)
    return merged


def _kernel_dims(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
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
        f"{BLOCKS_PREFIX}attention/{part}": base[f"{BLOCKS_PREFIX}attention/{part}/bias"].shape
        for part in ("key", "value")
    }
    hidden = {f"{BLOCKS_PREFIX}mlp/down": base[f"{BLOCKS_PREFIX}mlp/down/kernel"].shape[:2]}
    return {f"{name}/factor": jnp.zeros(shape) for name, shape in (heads | hidden).items()}


def ia3_merge(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Scales keys, values and hidden values (IA3, arXiv:2205.05638), folded into kernels and
    biases.
    """
    del spec
    merged = dict(base)
    for part in ("key", "value"):
        name = f"{BLOCKS_PREFIX}attention/{part}"
        factor = 1 + extra[f"{name}/factor"]
        merged[f"{name}/kernel"] = base[f"{name}/kernel"] * factor[:, None]
        merged[f"{name}/bias"] = base[f"{name}/bias"] * factor
    name = f"{BLOCKS_PREFIX}mlp/down"
    merged[f"{name}/kernel"] = base[f"{name}/kernel"] * (1 + extra[f"{name}/factor"])[:, :, None]
    return merged


def adapter_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Adapters after attention and after the MLP: Dense to [N, Z], GELU, Dense back (initially
    zero).
    """
    depth, width = base[f"{BLOCKS_PREFIX}mlp/down/bias"].shape
    extra = {}
    for name, subkey in zip(
        ("attention_adapter", "mlp_adapter"), jax.random.split(key), strict=True
    ):
        extra[f"{PEFT_PREFIX}{name}/down/kernel"] = (
            jax.random.normal(subkey, (depth, width, spec.adapter_dim)) * width**-0.5
        )
        extra[f"{PEFT_PREFIX}{name}/down/bias"] = jnp.zeros((depth, spec.adapter_dim))
        extra[f"{PEFT_PREFIX}{name}/up/kernel"] = jnp.zeros((depth, spec.adapter_dim, width))
        extra[f"{PEFT_PREFIX}{name}/up/bias"] = jnp.zeros((depth, width))
    return extra


def prefix_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Prefix keys and values [N, Z, H, K] that every token may read in addition to its own
    clip's.
    """
    depth, heads, width = base[f"{BLOCKS_PREFIX}attention/key/bias"].shape
    keys = zip(("key", "value"), jax.random.split(key), strict=True)
    return {
        f"{PEFT_PREFIX}attention/prefix/{name}": jax.random.normal(
            subkey, (depth, spec.num_virtual_tokens, heads, width)
        )
        * _STD
        for name, subkey in keys
    }


def prompt_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Shallow prompts: tokens [Z, D] that pass through the blocks with those of every clip."""
    width = base[f"{BLOCKS_PREFIX}mlp/down/bias"].shape[-1]
    return {
        f"{PROMPT_PREFIX}token": jax.random.normal(key, (spec.num_virtual_tokens, width)) * _STD
    }


def prompt_deep_init(key: Array, base: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Deep prompts [N, Z, D]: each block has its own tokens."""
    return {
        _DEEP_PROMPT: jax.random.normal(
            key,
            (
                *base[f"{BLOCKS_PREFIX}mlp/down/bias"].shape[:1],
                spec.num_virtual_tokens,
                base[f"{BLOCKS_PREFIX}mlp/down/bias"].shape[1],
            ),
        )
        * _STD
    }


def prompt_deep_merge(base: Flat, extra: Flat, spec: FinetuneSpec) -> dict[str, Array]:
    """Keys and values of deep prompts: a block discards the prompts' outputs, so nothing else
    matters.
    """
    del spec
    normalized = (
        _layer_norm(extra[_DEEP_PROMPT]) * base[f"{BLOCKS_PREFIX}attention_norm/scale"][:, None]
        + base[f"{BLOCKS_PREFIX}attention_norm/bias"][:, None]
    )
    merged = dict(base)
    for name in ("key", "value"):
        kernel, bias = (
            base[f"{BLOCKS_PREFIX}attention/{name}/{leaf}"] for leaf in ("kernel", "bias")
        )
        merged[f"{PEFT_PREFIX}attention/prefix/{name}"] = (
            jnp.einsum("nzd,ndhk->nzhk", normalized, kernel) + bias[:, None]
        )
    if f"{BLOCKS_PREFIX}attention/key_norm/scale" in base:
        key = merged[f"{PEFT_PREFIX}attention/prefix/key"]
        rms = jnp.sqrt(jnp.mean(jnp.square(key), axis=-1, keepdims=True) + _EPSILON)
        merged[f"{PEFT_PREFIX}attention/prefix/key"] = (
            key / rms * base[f"{BLOCKS_PREFIX}attention/key_norm/scale"][:, None, None]
        )
    return merged


def _layer_norm(x_NZD: Array) -> Array:
    """Normalized to mean 0 and variance 1, like linen's LayerNorm."""
    return (x_NZD - x_NZD.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(
        x_NZD.var(axis=-1, keepdims=True) + _EPSILON
    )


_NOT_ENCODER = r"^(?!encoder/)"
METHODS: dict[str, Method] = {
    "full": Method("", no_init, add_extra),
    "linear_probe": Method(_NOT_ENCODER, no_init, add_extra),
    "attentive_probe": Method(_NOT_ENCODER, no_init, add_extra),
    "bitfit": Method(f"{_NOT_ENCODER}|/bias$", no_init, add_extra),
    "lora": Method(_NOT_ENCODER, lora_init, lora_merge),
    "ia3": Method(_NOT_ENCODER, ia3_init, ia3_merge),
    "adapter": Method(_NOT_ENCODER, adapter_init, add_extra),
    "prefix": Method(_NOT_ENCODER, prefix_init, add_extra),
    "vpt_shallow": Method(_NOT_ENCODER, prompt_init, add_extra),
    "vpt_deep": Method(_NOT_ENCODER, prompt_deep_init, prompt_deep_merge),
}
