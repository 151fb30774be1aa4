# SPDX-License-Identifier: Apache-2.0
"""The model at the border: a pair of pure functions over the linen modules of the encoder, the decoder and the heads.

Legend: B rows, L slots of all modalities together, D width, S clips of a row, C classes, Q queries, P payload.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.nn import embed, heads, policy, reduce, transformer
from particlejax.nn.reduce import Tokens
from particlejax.particles.types import Batch, Particles
from particlejax.spec import ModelSpec
from particlejax.typing import Params


class Payload(NamedTuple):
    """What a modality's payloads are: `size` numbers, or ids below `vocabulary` where that is not 0."""

    size: int
    vocabulary: int = 0


class Model(NamedTuple):
    """init(key, batch) -> params; apply(params, method, *args, key=None) -> what the method of `ParticleModel` returns.

    A key makes it training: dropout and stochastic depth happen only with one.
    """

    init: Callable[[Array, Batch], Params]
    apply: Callable[..., Any]


def build(spec: ModelSpec, payloads: Mapping[str, Payload], *, classes: int = 0, decoder: bool = False) -> Model:
    """The model of a spec for these modalities; with a classification head where classes > 0."""
    module = ParticleModel(spec, tuple(sorted(payloads.items())), classes, decoder)

    def init(key: Array, batch: Batch) -> Params:
        return module.init(key, batch)["params"]

    def apply(params: Params, method: str, *args: Any, key: Array | None = None) -> Any:
        rngs = {} if key is None else {"dropout": key}
        return module.apply({"params": params}, *args, method=method, rngs=rngs)

    return Model(init, apply)


class ParticleModel(nn.Module):
    """Particles of any modalities -> one token sequence -> Transformer; decoder and head are parts of their own."""

    spec: ModelSpec
    payloads: tuple[tuple[str, Payload], ...]
    classes: int
    with_decoder: bool

    def setup(self) -> None:
        spec, dtype = self.spec, policy.PRECISIONS[self.spec.dtype].compute
        self.encoder = Encoder(spec, self.payloads)
        if self.with_decoder:
            self.decoder = Decoder(spec, self.payloads)
        if self.classes:
            if spec.pool == "attention":
                self.pool = heads.AttentivePool(spec.pool_heads, dtype)
            self.head_norm = nn.LayerNorm(dtype=dtype)
            self.head = nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.02))

    def __call__(self, batch: Batch) -> None:
        """Touches every parameter once, for `init`."""
        tokens, _ = self.encode(batch.particles)
        if self.with_decoder:
            for name, particles in batch.particles.items():
                self.decode(tokens, particles, name)
        if self.classes:
            self.classify(tokens, batch.label.shape[1])

    def encode(self, particles: Mapping[str, Particles]) -> tuple[Tokens, dict[str, tuple[Array, ...]]]:
        """Tokens of all particles, and under 'blocks' every block's output, as `Transformer` gives them."""
        return self.encoder(particles)

    def decode(self, tokens: Tokens, query: Particles, modality: str) -> Array:
        """Payloads [B, Q, P] at the queries' places and extents; their own payload is not looked at."""
        return self.decoder(tokens, query, modality)

    def classify(self, tokens: Tokens, clips: int) -> Array:
        """Logits of each clip, float32 [B, S, C], from its tokens pooled as the spec says."""
        precision = policy.PRECISIONS[self.spec.dtype]
        if self.spec.pool == "attention":
            pooled = self.pool(tokens.x, tokens.segment, clips)
        else:
            pooled = losses.clip_mean(tokens.x.astype(precision.reduce), tokens.segment, clips, tokens.mass)
        return self.head(self.head_norm(pooled)).astype(precision.reduce)


class Encoder(nn.Module):
    """Embeds the particles of every modality and runs the Transformer over all of them."""

    spec: ModelSpec
    payloads: tuple[tuple[str, Payload], ...]

    @nn.compact
    def __call__(self, particles: Mapping[str, Particles]) -> tuple[Tokens, dict[str, tuple[Array, ...]]]:
        spec, dtype = self.spec, policy.PRECISIONS[self.spec.dtype].compute
        place = embed.Place(spec.width, dtype, name="place")
        modality = embed.Modality(spec.width, tuple(name for name, _ in self.payloads), name="modality")
        parts = []
        for name, payload in self.payloads:
            if name in particles:
                p = particles[name]
                content = embed.Payload(spec.width, payload.vocabulary, dtype, name=f"payload_{name}")(p.payload)
                parts.append(content + place(p.place, p.extent) + modality(name).astype(dtype))
        known = [particles[name] for name, _ in self.payloads if name in particles]
        places = jnp.concatenate([p.place for p in known], axis=1)
        segment = jnp.concatenate([p.segment for p in known], axis=1)
        reduction = reduce.Reduction(spec.reduce, spec.reduce_after, spec.reduce_keep) if spec.reduce_after else None
        body = transformer.Transformer(spec.depth, spec.heads, spec.mlp * spec.width, spec.near, spec.dropout,
                                       spec.drop_path, spec.unroll, dtype, reduction, spec.remat, name="transformer")
        tokens, blocks = body(Tokens(jnp.concatenate(parts, axis=1), places, segment))
        return tokens, {"blocks": blocks}


class Decoder(nn.Module):
    """Asks the tokens what is at a place: blocks of cross-attention, queries blind to each other (arXiv:2401.14391)."""

    spec: ModelSpec
    payloads: tuple[tuple[str, Payload], ...]

    @nn.compact
    def __call__(self, tokens: Tokens, query: Particles, modality: str) -> Array:
        spec, dtype = self.spec, policy.PRECISIONS[self.spec.dtype].compute
        width = spec.decoder_width
        names = tuple(name for name, _ in self.payloads)
        context = nn.Dense(width, dtype=dtype, name="context")(tokens.x)
        x = embed.Place(width, dtype, name="place")(query.place, query.extent)
        x += embed.Modality(width, names, name="modality")(modality).astype(dtype)
        body = transformer.Transformer(spec.decoder_depth, spec.decoder_heads, spec.mlp * width, spec.near,
                                       unroll=spec.unroll, dtype=dtype, remat=spec.remat, name="transformer")
        answers, _ = body(Tokens(x, query.place, query.segment), tokens._replace(x=context))
        payload = dict(self.payloads)[modality]
        out = nn.Dense(payload.vocabulary or payload.size, dtype=jnp.float32, name=f"payload_{modality}")
        return out(answers.x.astype(jnp.float32))


def parameter_shapes(model: Model, batch: Batch) -> Any:
    """Shapes of the parameters, without computing them."""
    return jax.eval_shape(model.init, jax.random.key(0), batch)
