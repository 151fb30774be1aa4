# SPDX-License-Identifier: Apache-2.0
"""Pre-norm Transformer blocks over packed rows: attention stays within a segment.

Legend: B rows, L queries, M keys, D width, H heads, K width of a head.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.nn import policy, reduce
from particlejax.nn.reduce import Tokens

_FAR = -1e9  # the logit of what must not count; finite, so that an empty slot's softmax stays finite


def same_segment(query_BL: Array, key_BM: Array) -> Array:
    """What each query may read, bool [B, L, M]: keys of its own clip; a query in an empty slot reads nothing."""
    return (query_BL[:, :, None] == key_BM[:, None, :]) & (key_BM[:, None, :] > 0)


class Between(NamedTuple):
    """What attention is told besides content: the places of queries [B, L, 3] and keys [B, M, 3], and who may read whom."""

    query: Array
    key: Array
    may: Array  # bool [B, L, M]
    mass: Array | None = None  # float32 [B, M], how many particles a key stands for; None: each for one


def between(query: Tokens, key: Tokens) -> Between:
    """The relation of queries to keys, each within its segment."""
    return Between(query.place, key.place, same_segment(query.segment, key.segment), key.mass)


class Nearness(nn.Module):
    """Logits [B, H, L, M] that fall with the squared distance of places: each head learns how fast along each axis.

    A prior of locality in continuous time and space, which a Transformer otherwise needs many clips to find. Heads start
    between narrow and wide, alternating in time. Linear in features of query and key, so no pair of places is formed.
    """

    heads: int

    @nn.compact
    def __call__(self, where: Between) -> Array:
        log_sharpness = self.param("log_sharpness", _spread, (self.heads, 3))
        sharpness = jnp.exp(log_sharpness)
        # -s (q - k)^2 without the term in q alone, which softmax does not see
        query = 2 * where.query[:, None] * sharpness[None, :, None]
        cross = jnp.einsum("bhlk,bmk->bhlm", query, where.key)
        return cross - jnp.einsum("hk,bmk->bhm", sharpness, where.key**2)[:, :, None]


def _spread(key: Array, shape: tuple[int, int]) -> Array:
    del key
    heads = np.arange(shape[0])
    space = np.geomspace(0.1, 1.0, shape[0]) if shape[0] > 1 else np.array([0.3])  # frames
    time = np.where(heads % 2, 2.0, 0.3)  # seconds
    return jnp.asarray(-np.log(2 * np.stack([time, space, space], axis=-1) ** 2), jnp.float32)


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] to keys [B, M, D]."""

    heads: int
    near: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, y_BMD: Array, where: Between) -> Array:
        width = x_BLD.shape[-1]
        split = (self.heads, width // self.heads)
        query, key, value = (nn.DenseGeneral(split, dtype=self.dtype, name=name)(of).swapaxes(1, 2)  # [B, H, L, K]
                             for name, of in (("query", x_BLD), ("key", y_BMD), ("value", y_BMD)))
        # Heads before slots: XLA's CPU runs this batched product several times faster than [B, L, H, K].
        logits = jnp.einsum("bhlk,bhmk->bhlm", query * split[1] ** -0.5, key, preferred_element_type=jnp.float32)
        if self.near:
            logits += Nearness(self.heads, name="nearness")(where)
        if where.mass is not None:  # a merged token counts as what it was merged from (arXiv:2210.09461, section 3)
            logits += jnp.log(jnp.maximum(where.mass, 1.0))[:, None, None]
        logits = jnp.where(where.may[:, None], logits, _FAR)
        weights = jax.nn.softmax(logits).astype(self.dtype)
        some = where.may.any(axis=-1)[:, None, :, None]  # who may read nothing would else read the mean of the whole row
        mixed = jnp.where(some, jnp.einsum("bhlm,bhmk->bhlk", weights, value), 0).swapaxes(1, 2)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


class Mlp(nn.Module):
    """Two Dense layers with GELU between them."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        hidden = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="up")(x_BLD))
        return nn.Dense(x_BLD.shape[-1], dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `context`, the attention is to that instead of to x itself."""

    heads: int
    mlp: int
    near: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, where: Between, context: Array | None = None, drop_path: Array | float = 0.0
                 ) -> Array:
        norm = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x_BLD)
        read = norm if context is None else context
        attention = Attention(self.heads, self.near, self.dtype, name="attention")
        x_BLD += self._drop(attention(norm, read, where), drop_path)
        norm = nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(x_BLD)
        return x_BLD + self._drop(Mlp(self.mlp, self.dtype, name="mlp")(norm), drop_path)

    def _drop(self, x_BLD: Array, drop_path: Array | float) -> Array:
        if not self.has_rng("dropout"):  # a key for dropout is what makes it training
            return x_BLD
        x_BLD = nn.Dropout(self.dropout, deterministic=False)(x_BLD)
        keep = 1.0 - jnp.asarray(drop_path, jnp.float32)
        alive = jax.random.bernoulli(self.make_rng("dropout"), keep, (x_BLD.shape[0], 1, 1))
        return jnp.where(alive, x_BLD / keep, 0.0).astype(x_BLD.dtype)


class Transformer(nn.Module):
    """`depth` blocks with stacked parameters [depth, ...], scanned over, and a final norm.

    Returns the tokens, normed, and every block's output [blocks, B, L, D], one array for each number of tokens L: after the
    blocks that `reduction` names, a share of them stays. With `context`, the tokens read that instead of each other.
    """

    depth: int
    heads: int
    mlp: int
    near: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    unroll: bool = True
    dtype: Any = jnp.float32
    reduction: reduce.Reduction | None = None
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: Tokens, context: Tokens | None = None) -> tuple[Tokens, tuple[Array, ...]]:
        block = Block(self.heads, self.mlp, self.near, self.dropout, self.dtype, parent=None)
        inputs = (tokens.x, between(tokens, context or tokens), None if context is None else context.x)
        stacked = self.param("blocks", lambda key: jax.vmap(lambda k: block.init(k, *inputs)["params"])(
            jax.random.split(key, self.depth)))
        keys = jax.random.split(self.make_rng("dropout"), self.depth) if self.has_rng("dropout") else None
        layers = (stacked, jnp.linspace(0.0, self.drop_path, self.depth), keys)
        outputs, edges = [], [*(self.reduction.after if self.reduction else ()), self.depth]
        for start, stop in zip([0, *edges[:-1]], edges, strict=True):
            part = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], layers)
            tokens, each = self._run(block, tokens, context, part, stop - start)
            outputs.append(each)
            if stop < self.depth:
                tokens = self.reduction(tokens)
        return tokens._replace(x=nn.LayerNorm(dtype=self.dtype, name="norm")(tokens.x)), tuple(outputs)

    def _run(self, block: Block, tokens: Tokens, context: Tokens | None, layers: Any, number: int) -> tuple[Tokens, Array]:
        where = between(tokens, context or tokens)

        def step(x: Array, layer: Any) -> tuple[Array, Array]:
            params, drop_path, key = layer
            rngs = {} if key is None else {"dropout": key}
            x = block.apply({"params": params}, x, where, None if context is None else context.x, drop_path, rngs=rngs)
            return x, x

        step = policy.remat(self.remat, step, self.unroll)
        x, each = jax.lax.scan(step, tokens.x, layers, unroll=number if self.unroll else 1)
        return tokens._replace(x=x), each
