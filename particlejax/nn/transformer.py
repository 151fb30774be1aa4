# SPDX-License-Identifier: Apache-2.0
"""Pre-norm Transformer blocks over packed rows: attention stays within a segment and obeys the
fusion.

Legend: B rows, L tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from particlejax.core import tree
from particlejax.distributed import sharding
from particlejax.nn import fusion, peft_hooks, precision, token_reduction
from particlejax.nn.attention import (
    Attention,
    AttentionContext,
    BlockConfig,
    make_attention_context,
)
from particlejax.nn.dense import Dense
from particlejax.nn.token_reduction import Tokens


class Mlp(nn.Module):
    """MLP: two Dense layers with GELU between them; gated_mlp: SwiGLU at two thirds of the width,
    for equal cost.
    """

    mlp_dim: int
    dtype: Any = jnp.float32
    gated_mlp: bool = False

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        hidden_dim = self.mlp_dim * 2 // 3 if self.gated_mlp else self.mlp_dim
        hidden = Dense(hidden_dim, dtype=self.dtype, name="up")(x_BLD)
        if self.gated_mlp:
            hidden *= nn.silu(Dense(hidden_dim, dtype=self.dtype, name="gate")(x_BLD))
        else:
            hidden = nn.gelu(hidden)
        return Dense(x_BLD.shape[-1], dtype=self.dtype, name="down")(hidden)


class LayerScale(nn.Module):
    """LayerScale: a learned factor per channel with a small initial value."""

    init_value: float

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(self.init_value), x_BLD.shape[-1:])
        return (x_BLD * scale[None, None]).astype(x_BLD.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `context`, cross-attention to it instead
    of self-attention.

    Without an MLP (hidden 0) only the first half.
    """

    width: int
    num_heads: int
    mlp_dim: int
    config: BlockConfig = BlockConfig()

    def setup(self) -> None:
        config = self.config
        self.attention_norm = nn.LayerNorm(dtype=config.dtype)
        self.attention = Attention(self.width, self.num_heads, config)
        if config.layer_scale:
            self.attention_scale = LayerScale(config.layer_scale)
        if self.mlp_dim:
            self.mlp_norm = nn.LayerNorm(dtype=config.dtype)
            self.mlp = Mlp(self.mlp_dim, config.dtype, config.gated_mlp)
            if config.layer_scale:
                self.mlp_scale = LayerScale(config.layer_scale)
        self.dropout = nn.Dropout(config.dropout, deterministic=False)

    def __call__(
        self,
        x_BLD: Array,
        attention_context: AttentionContext,
        context: Array | None = None,
        drop_path: Array | float = 0.0,
    ) -> Array:
        normalized = self.attention_norm(x_BLD)
        source = normalized if context is None else context
        return self._add_residuals(
            x_BLD, self.attention(normalized, source, attention_context), drop_path
        )

    def project_qkv(self, x_BLD: Array, place: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of a part of a row."""
        normalized = self.attention_norm(x_BLD)
        return self.attention.project_q(normalized, place), *self.attention.project_kv(
            normalized, place
        )

    def attend_projected(
        self,
        x_BLD: Array,
        query: Array,
        key: Array,
        value: Array,
        attention_context: AttentionContext,
        drop_path: Array | float,
    ) -> Array:
        """The block's output for a part of a row, given the keys and values of all parts that it
        attends to.
        """
        return self._add_residuals(
            x_BLD, self.attention.attend(query, key, value, attention_context), drop_path
        )

    def _add_residuals(self, x_BLD: Array, attended: Array, drop_path: Array | float) -> Array:
        attended = peft_hooks.apply_adapter(
            attended, self.get_variable("params", "attention_adapter")
        )
        x_BLD += self._drop_path(
            self.attention_scale(attended) if self.config.layer_scale else attended, drop_path
        )
        if not self.mlp_dim:
            return x_BLD
        mlp_output = peft_hooks.apply_adapter(
            self.mlp(self.mlp_norm(x_BLD)), self.get_variable("params", "mlp_adapter")
        )
        return x_BLD + self._drop_path(
            self.mlp_scale(mlp_output) if self.config.layer_scale else mlp_output, drop_path
        )

    def _drop_path(self, x_BLD: Array, drop_path: Array | float) -> Array:
        if not self.has_rng("dropout"):  # a dropout key means training
            return x_BLD
        x_BLD = self.dropout(x_BLD)
        keep_prob = 1.0 - jnp.asarray(drop_path, jnp.float32)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep_prob, (x_BLD.shape[0], 1, 1))
        return jnp.where(kept, x_BLD / keep_prob, 0.0).astype(x_BLD.dtype)


class LayerParams(NamedTuple):
    """Stacked [layers, ...]: parameters of the blocks and of the preceding cross-attention, by
    part, or '' for all parts.
    """

    blocks: Mapping[str, Any]
    cross: Mapping[str, Any]
    drop_path: Array
    key: Array | None


class Transformer(nn.Module):
    """`depth` blocks with stacked parameters [depth, ...], run by a scan, and a final norm.

    Returns the normalized tokens and the outputs of all blocks [blocks, B, L, D], one array for
    each token count L: after the blocks that `reduction` names, a fraction of the tokens is kept.
    With `context`, the tokens attend to it instead of each other; with `parts`, a row consists of
    parts that attend to each other as the fusion says (nn/fusion.py).
    """

    depth: int
    num_heads: int
    mlp_dim: int
    config: BlockConfig = BlockConfig()
    drop_path: float = 0.0
    unroll_layers: bool = True
    reduction: token_reduction.TokenReduction | None = None
    remat_policy: str = "none"

    @nn.compact
    def __call__(
        self, tokens: Tokens, context: Tokens | None = None, parts: fusion.Parts | None = None
    ) -> tuple[Tokens, tuple[Array, ...]]:
        block = Block(tokens.x.shape[-1], self.num_heads, self.mlp_dim, self.config, parent=None)
        init_inputs = (
            tokens.x,
            make_attention_context(tokens, context or tokens),
            None if context is None else context.x,
        )
        keys = (
            jax.random.split(self.make_rng("dropout"), self.depth)
            if self.has_rng("dropout")
            else None
        )
        part_names = parts.names if parts and parts.separate_encoders else None
        layers = LayerParams(
            self._stacked_params("blocks", block, self.depth, init_inputs, part_names),
            {},
            jnp.linspace(0.0, self.drop_path, self.depth),
            keys,
        )
        tokens = tokens._replace(x=sharding.constrain_sequence(tokens.x))
        outputs, boundaries = (
            [],
            [*(self.reduction.after_blocks if self.reduction else ()), self.depth],
        )
        if parts and 0 < parts.fuse_from < self.depth:
            boundaries = [parts.fuse_from, self.depth]
        for start, stop in zip([0, *boundaries[:-1]], boundaries, strict=True):
            layer_slice = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], layers)
            if parts is None:
                tokens, block_outputs = self._run_blocks(
                    block, tokens, context, layer_slice, stop - start
                )
            else:
                tokens, block_outputs = self._run_parts(
                    block, tokens, parts, layer_slice, start >= parts.fuse_from
                )
            outputs.append(block_outputs)
            if self.reduction and stop < self.depth:
                tokens = self.reduction(tokens)
        return tokens._replace(
            x=nn.LayerNorm(dtype=self.config.dtype, name="norm")(tokens.x)
        ), tuple(outputs)

    def _stacked_params(
        self, name: str, block: Block, depth: int, inputs: tuple, parts: Sequence[str] | None
    ) -> dict[str, Any]:
        def init(key: Array) -> Any:
            return jax.vmap(lambda k: block.init(k, *inputs)["params"])(
                jax.random.split(key, depth)
            )

        if parts:
            return {part: self.param(f"{name}_{part}", init) for part in parts}
        stacked = self.param(name, init)
        # adapters and prefixes [depth, ...]
        extra = self.get_variable("params", "tuned") if name == "blocks" else None
        return {
            "": stacked
            if extra is None
            else tree.nest({**tree.flatten(stacked), **tree.flatten(extra)})
        }

    def _run_blocks(
        self,
        block: Block,
        tokens: Tokens,
        context: Tokens | None,
        layers: LayerParams,
        num_blocks: int,
    ) -> tuple[Tokens, Array]:
        attention_context = make_attention_context(tokens, context or tokens)

        def step(x: Array, layer: LayerParams) -> tuple[Array, Array]:
            rngs = {} if layer.key is None else {"dropout": layer.key}
            source = None if context is None else context.x
            x = block.apply(
                {"params": layer.blocks[""]},
                x,
                attention_context,
                source,
                layer.drop_path,
                rngs=rngs,
            )
            return x, x

        step = precision.remat(self.remat_policy, step, self.unroll_layers)
        x, block_outputs = jax.lax.scan(
            step, tokens.x, layers, unroll=num_blocks if self.unroll_layers else 1
        )
        return tokens._replace(x=x), block_outputs

    def _run_parts(
        self, block: Block, tokens: Tokens, parts: fusion.Parts, layers: LayerParams, fused: bool
    ) -> tuple[Tokens, Array]:
        attention_context, num_blocks = (
            make_attention_context(tokens, tokens),
            layers.drop_path.shape[0],
        )
        cross = Block(block.width, self.num_heads, 0, self.config, parent=None)
        cross_attended = parts.cross_attended_parts() if fused else None
        if cross_attended:
            part_names = (
                [
                    name
                    for name, attended in zip(parts.names, cross_attended, strict=True)
                    if attended
                ]
                if parts.separate_encoders
                else None
            )
            layers = layers._replace(
                cross=self._stacked_params(
                    "cross", cross, num_blocks, (tokens.x, attention_context), part_names
                )
            )

        def step(x: Array, layer: LayerParams) -> tuple[Array, Array]:
            if cross_attended:
                x = run_block_over_parts(
                    cross, layer.cross, x, attention_context, parts, cross_attended, layer, 1
                )
            x = run_block_over_parts(
                block,
                layer.blocks,
                x,
                attention_context,
                parts,
                parts.attended_parts(fused),
                layer,
                0,
            )
            return x, x

        step = precision.remat(self.remat_policy, step, self.unroll_layers)
        x, block_outputs = jax.lax.scan(
            step, tokens.x, layers, unroll=num_blocks if self.unroll_layers else 1
        )
        return tokens._replace(x=x), block_outputs


def run_block_over_parts(
    block: Block,
    params: Mapping[str, Any],
    x: Array,
    attention_context: AttentionContext,
    parts: fusion.Parts,
    attended_parts: tuple[tuple[int, ...], ...],
    layer: LayerParams,
    rng_offset: int,
) -> Array:
    """A block over the parts of a row: part i attends to the parts `reads[i]`; other products are
    never formed.

    Attention also stays within segments. A part that attends to nothing is attended by none and
    stays unchanged.
    """
    spans = parts.spans()
    part_params = [
        {"params": params[name] if name in params else params.get("")} for name in parts.names
    ]
    projections = [
        block.apply(p, x[:, s], attention_context.query_place[:, s], method="project_qkv")
        if attended
        else None
        for p, s, attended in zip(part_params, spans, attended_parts, strict=True)
    ]
    outputs = []
    for i, (p, span) in enumerate(zip(part_params, spans, strict=True)):
        if not attended_parts[i]:
            outputs.append(x[:, span])
            continue
        key, value = (
            jnp.concatenate([projections[j][k] for j in attended_parts[i]], axis=2) for k in (1, 2)
        )
        attended_spans = [spans[j] for j in attended_parts[i]]
        query_segment, key_segment = attention_context.segments
        part_context = AttentionContext(
            attention_context.query_place[:, span],
            jnp.concatenate([attention_context.key_place[:, s] for s in attended_spans], axis=1),
            jnp.concatenate([attention_context.mask[:, span, s] for s in attended_spans], axis=2),
            segments=(
                query_segment[:, span],
                jnp.concatenate([key_segment[:, s] for s in attended_spans], axis=1),
            ),
        )
        rngs = (
            {}
            if layer.key is None
            else {"dropout": jax.random.fold_in(layer.key, 2 * i + rng_offset)}
        )
        outputs.append(
            block.apply(
                p,
                x[:, span],
                projections[i][0],
                key,
                value,
                part_context,
                layer.drop_path,
                rngs=rngs,
                method="attend_projected",
            )
        )
    return jnp.concatenate(outputs, axis=1)
