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
from particlejax.nn.attention import Attention, Between, Style, between
from particlejax.nn.dense import Dense
from particlejax.nn.token_reduction import Tokens


class Mlp(nn.Module):
    """MLP: two Dense layers with GELU between them; gated: SwiGLU at two thirds of the width, for
    equal cost.
    """

    hidden: int
    dtype: Any = jnp.float32
    gated: bool = False

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        number = self.hidden * 2 // 3 if self.gated else self.hidden
        hidden = Dense(number, dtype=self.dtype, name="up")(x_BLD)
        if self.gated:
            hidden *= nn.silu(Dense(number, dtype=self.dtype, name="gate")(x_BLD))
        else:
            hidden = nn.gelu(hidden)
        return Dense(x_BLD.shape[-1], dtype=self.dtype, name="down")(hidden)


class Scale(nn.Module):
    """LayerScale: a learned factor per channel with a small initial value."""

    start: float

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(self.start), x_BLD.shape[-1:])
        return (x_BLD * scale[None, None]).astype(x_BLD.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `context`, cross-attention to it instead
    of self-attention.

    Without an MLP (hidden 0) only the first half.
    """

    width: int
    heads: int
    hidden: int
    style: Style = Style()

    def setup(self) -> None:
        style = self.style
        self.attention_norm = nn.LayerNorm(dtype=style.dtype)
        self.attention = Attention(self.width, self.heads, style)
        if style.layer_scale:
            self.attention_scale = Scale(style.layer_scale)
        if self.hidden:
            self.mlp_norm = nn.LayerNorm(dtype=style.dtype)
            self.mlp = Mlp(self.hidden, style.dtype, style.gated)
            if style.layer_scale:
                self.mlp_scale = Scale(style.layer_scale)
        self.dropout = nn.Dropout(style.dropout, deterministic=False)

    def __call__(
        self,
        x_BLD: Array,
        where: Between,
        context: Array | None = None,
        drop_path: Array | float = 0.0,
    ) -> Array:
        norm = self.attention_norm(x_BLD)
        read = norm if context is None else context
        return self._add(x_BLD, self.attention(norm, read, where), drop_path)

    def project(self, x_BLD: Array, place: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of a part of a row."""
        norm = self.attention_norm(x_BLD)
        return self.attention.ask(norm, place), *self.attention.tell(norm, place)

    def finish(
        self,
        x_BLD: Array,
        query: Array,
        key: Array,
        value: Array,
        where: Between,
        drop_path: Array | float,
    ) -> Array:
        """The block's output for a part of a row, given the keys and values of all parts that it
        attends to.
        """
        return self._add(x_BLD, self.attention.answer(query, key, value, where), drop_path)

    def _add(self, x_BLD: Array, read: Array, drop_path: Array | float) -> Array:
        read = peft_hooks.adapted(read, self.get_variable("params", "attention_adapter"))
        x_BLD += self._drop(
            self.attention_scale(read) if self.style.layer_scale else read, drop_path
        )
        if not self.hidden:
            return x_BLD
        made = peft_hooks.adapted(
            self.mlp(self.mlp_norm(x_BLD)), self.get_variable("params", "mlp_adapter")
        )
        return x_BLD + self._drop(
            self.mlp_scale(made) if self.style.layer_scale else made, drop_path
        )

    def _drop(self, x_BLD: Array, drop_path: Array | float) -> Array:
        if not self.has_rng("dropout"):  # a dropout key means training
            return x_BLD
        x_BLD = self.dropout(x_BLD)
        keep = 1.0 - jnp.asarray(drop_path, jnp.float32)
        alive = jax.random.bernoulli(self.make_rng("dropout"), keep, (x_BLD.shape[0], 1, 1))
        return jnp.where(alive, x_BLD / keep, 0.0).astype(x_BLD.dtype)


class Layers(NamedTuple):
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
    heads: int
    mlp: int
    style: Style = Style()
    drop_path: float = 0.0
    unroll: bool = True
    reduction: token_reduction.Reduction | None = None
    remat: str = "none"

    @nn.compact
    def __call__(
        self, tokens: Tokens, context: Tokens | None = None, parts: fusion.Parts | None = None
    ) -> tuple[Tokens, tuple[Array, ...]]:
        block = Block(tokens.x.shape[-1], self.heads, self.mlp, self.style, parent=None)
        inputs = (
            tokens.x,
            between(tokens, context or tokens),
            None if context is None else context.x,
        )
        keys = (
            jax.random.split(self.make_rng("dropout"), self.depth)
            if self.has_rng("dropout")
            else None
        )
        own = parts.names if parts and parts.separate else None
        layers = Layers(
            self._stacked("blocks", block, self.depth, inputs, own),
            {},
            jnp.linspace(0.0, self.drop_path, self.depth),
            keys,
        )
        tokens = tokens._replace(x=sharding.spread(tokens.x))
        outputs, edges = [], [*(self.reduction.after if self.reduction else ()), self.depth]
        if parts and 0 < parts.fuse_from < self.depth:
            edges = [parts.fuse_from, self.depth]
        for start, stop in zip([0, *edges[:-1]], edges, strict=True):
            part = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], layers)
            if parts is None:
                tokens, each = self._run(block, tokens, context, part, stop - start)
            else:
                tokens, each = self._run_parts(block, tokens, parts, part, start >= parts.fuse_from)
            outputs.append(each)
            if self.reduction and stop < self.depth:
                tokens = self.reduction(tokens)
        return tokens._replace(
            x=nn.LayerNorm(dtype=self.style.dtype, name="norm")(tokens.x)
        ), tuple(outputs)

    def _stacked(
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

    def _run(
        self, block: Block, tokens: Tokens, context: Tokens | None, layers: Layers, number: int
    ) -> tuple[Tokens, Array]:
        where = between(tokens, context or tokens)

        def step(x: Array, layer: Layers) -> tuple[Array, Array]:
            rngs = {} if layer.key is None else {"dropout": layer.key}
            read = None if context is None else context.x
            x = block.apply(
                {"params": layer.blocks[""]}, x, where, read, layer.drop_path, rngs=rngs
            )
            return x, x

        step = precision.remat(self.remat, step, self.unroll)
        x, each = jax.lax.scan(step, tokens.x, layers, unroll=number if self.unroll else 1)
        return tokens._replace(x=x), each

    def _run_parts(
        self, block: Block, tokens: Tokens, parts: fusion.Parts, layers: Layers, fused: bool
    ) -> tuple[Tokens, Array]:
        where, number = between(tokens, tokens), layers.drop_path.shape[0]
        cross = Block(block.width, self.heads, 0, self.style, parent=None)
        others = parts.others() if fused else None
        if others:
            own = (
                [name for name, read in zip(parts.names, others, strict=True) if read]
                if parts.separate
                else None
            )
            layers = layers._replace(
                cross=self._stacked("cross", cross, number, (tokens.x, where), own)
            )

        def step(x: Array, layer: Layers) -> tuple[Array, Array]:
            if others:
                x = over_parts(cross, layer.cross, x, where, parts, others, layer, 1)
            x = over_parts(block, layer.blocks, x, where, parts, parts.reads(fused), layer, 0)
            return x, x

        step = precision.remat(self.remat, step, self.unroll)
        x, each = jax.lax.scan(step, tokens.x, layers, unroll=number if self.unroll else 1)
        return tokens._replace(x=x), each


def over_parts(
    block: Block,
    params: Mapping[str, Any],
    x: Array,
    where: Between,
    parts: fusion.Parts,
    reads: tuple[tuple[int, ...], ...],
    layer: Layers,
    salt: int,
) -> Array:
    """A block over the parts of a row: part i attends to the parts `reads[i]`; other products are
    never formed.

    Attention also stays within segments. A part that attends to nothing is attended by none and
    stays unchanged.
    """
    spans = parts.spans()
    own = [{"params": params[name] if name in params else params.get("")} for name in parts.names]
    made = [
        block.apply(p, x[:, s], where.query[:, s], method="project") if r else None
        for p, s, r in zip(own, spans, reads, strict=True)
    ]
    outputs = []
    for i, (p, span) in enumerate(zip(own, spans, strict=True)):
        if not reads[i]:
            outputs.append(x[:, span])
            continue
        key, value = (jnp.concatenate([made[j][k] for j in reads[i]], axis=2) for k in (1, 2))
        rows = [spans[j] for j in reads[i]]
        asking, told = where.segments
        there = Between(
            where.query[:, span],
            jnp.concatenate([where.key[:, s] for s in rows], axis=1),
            jnp.concatenate([where.may[:, span, s] for s in rows], axis=2),
            segments=(asking[:, span], jnp.concatenate([told[:, s] for s in rows], axis=1)),
        )
        rngs = {} if layer.key is None else {"dropout": jax.random.fold_in(layer.key, 2 * i + salt)}
        outputs.append(
            block.apply(
                p,
                x[:, span],
                made[i][0],
                key,
                value,
                there,
                layer.drop_path,
                rngs=rngs,
                method="finish",
            )
        )
    return jnp.concatenate(outputs, axis=1)
