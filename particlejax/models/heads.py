# SPDX-License-Identifier: Apache-2.0
"""Heads: what an objective needs of the model besides the encoder, declared by the objective.

Each is a frozen dataclass that builds its linen module and says how it is applied; the model calls
it by its name (`model.head(params, NAME, ...)`). Legend: B rows, L slots of all modalities, l of
one, S clips of a row, C outputs, Q queries, D width, E width of an embedding, P payload.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from particlejax.config.modalities import ordered
from particlejax.config.model import ModelSpec
from particlejax.models.decoder import Decoder
from particlejax.models.modality import Payload
from particlejax.nn import precision
from particlejax.nn.heads import Codebook, Embed, Moment, Question
from particlejax.nn.token_reduction import Tokens
from particlejax.particles.types import Particles


class Sample(NamedTuple):
    """What the heads are called with once, to make their parameters.

    particles: those that the encoder saw, by modality; given: the unseen ones, too.
    """

    tokens: Tokens
    clips: int
    particles: Mapping[str, Particles]
    given: Mapping[str, Particles]


@dataclass(frozen=True)
class HeadSpec:
    """Base of all heads; `pools`: whether it reads one vector a clip."""

    pools = False

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """The linen module."""
        raise NotImplementedError

    def apply(self, model: Any, module: nn.Module, *args: Any) -> Any:
        """What the module makes of the arguments; model: the bound `ParticleModel`."""
        raise NotImplementedError

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """Arguments that touch every parameter."""
        raise NotImplementedError


@dataclass(frozen=True)
class NormHead(HeadSpec):
    """(vectors [..., D]) -> the same, layer-normed."""

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """A layer norm."""
        del payloads
        return nn.LayerNorm(dtype=_dtype(spec))

    def apply(self, model: Any, module: nn.Module, vectors: Array) -> Array:
        """Normed vectors."""
        del model
        return module(vectors)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call."""
        yield (sample.tokens.x.astype(jnp.float32),)


@dataclass(frozen=True)
class ClassifierHead(HeadSpec):
    """(tokens, clips) -> logits of each clip, float32 [B, S, C], from what the head `head_norm`
    makes of its vector.
    """

    outputs: int
    pools = True

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """A linear layer, float32."""
        del spec, payloads
        return nn.Dense(self.outputs, kernel_init=nn.initializers.normal(0.02))

    def apply(self, model: Any, module: nn.Module, tokens: Tokens, clips: int) -> Array:
        """Logits."""
        normed = model.apply_head("head_norm", model.pooled(tokens, clips))
        return module(normed).astype(jnp.float32)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call."""
        yield sample.tokens, sample.clips


@dataclass(frozen=True)
class ClipHead(HeadSpec):
    """(tokens, clips) -> logits of an objective's own question about each clip, float32 [B, S,
    C].
    """

    outputs: int
    pools = True

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """A linear layer on the normed vector of a clip."""
        del payloads
        return Question(self.outputs, _dtype(spec))

    def apply(self, model: Any, module: nn.Module, tokens: Tokens, clips: int) -> Array:
        """Logits."""
        return module(model.pooled(tokens, clips))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call."""
        yield sample.tokens, sample.clips


@dataclass(frozen=True)
class ParticleHead(HeadSpec):
    """(tokens, particles, modality) -> logits of each particle of a modality, float32 [B, l, C].

    particles: those that the tokens are of.
    """

    outputs: int

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """A linear layer on the normed token."""
        del payloads
        return Question(self.outputs, _dtype(spec))

    def apply(
        self,
        model: Any,
        module: nn.Module,
        tokens: Tokens,
        particles: Mapping[str, Particles],
        modality: str,
    ) -> Array:
        """Logits."""
        del model
        return module(part_of(tokens, particles, modality))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call."""
        yield sample.tokens, sample.particles, next(iter(sample.particles))


@dataclass(frozen=True)
class QueryHead(HeadSpec):
    """(tokens, query, modality) -> logits of particles that were not shown, at their places,
    float32 [B, Q, C].

    Reads what the head `predictor` (a `FeatureDecoderHead`) says of them.
    """

    outputs: int

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """A linear layer on the normed feature."""
        del payloads
        return Question(self.outputs, _dtype(spec))

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, query: Particles, modality: str
    ) -> Array:
        """Logits."""
        return module(model.apply_head("predictor", tokens, query, modality))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call."""
        name, query = next(iter(sample.particles.items()))
        yield sample.tokens, query, name


@dataclass(frozen=True)
class DecoderHead(HeadSpec):
    """(tokens, query, modality) -> payloads [B, Q, P] at the queries' places and extents.

    Their own payload is not looked at.
    """

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """The decoder."""
        return Decoder(spec, tuple((name, payloads[name]) for name in ordered(payloads)))

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, query: Particles, modality: str
    ) -> Array:
        """Payloads, or features."""
        del model
        return module(tokens, query, modality)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call for each modality."""
        for name, particles in sample.given.items():
            yield sample.tokens, particles, name


@dataclass(frozen=True)
class FeatureDecoderHead(DecoderHead):
    """(tokens, query, modality) -> features [B, Q, D] as an encoder that saw everything would give
    them there.
    """

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """The decoder with the encoder's width as its output."""
        return Decoder(
            spec, tuple((name, payloads[name]) for name in ordered(payloads)), features=True
        )


@dataclass(frozen=True)
class ProjectionHead(HeadSpec):
    """(tokens, clips, modality) -> unit vectors of each clip, float32 [B, S, E], to be compared
    with another modality's; logit scale and bias of that.
    """

    modalities: tuple[str, ...]
    pools = True

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """One map for each modality."""
        del payloads
        return Embed(spec.embed_dim, self.modalities, _dtype(spec))

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, clips: int, modality: str
    ) -> tuple[Array, Array, Array]:
        """Vectors, scale, bias."""
        return module(model.pooled(tokens, clips), modality)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call for each modality."""
        for name in self.modalities:
            yield sample.tokens, sample.clips, name


@dataclass(frozen=True)
class TokenProjectionHead(HeadSpec):
    """(tokens, modality) -> what of each token is compared with another modality's in time, float32
    [B, L, E]; logit scale and bias of that.
    """

    modalities: tuple[str, ...]

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """One map for each modality, of any length."""
        del payloads
        return Embed(spec.embed_dim, self.modalities, _dtype(spec), unit=False, bias=0.0)

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, modality: str
    ) -> tuple[Array, Array, Array]:
        """Vectors, scale, bias."""
        del model
        return module(tokens.x, modality)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call for each modality."""
        for name in self.modalities:
            yield sample.tokens, name


@dataclass(frozen=True)
class CodebookHead(HeadSpec):
    """(payload [B, L, P]) -> the number of the nearest code, int32 [B, L]; nothing learns from
    it.
    """

    modality: str
    codes: int

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """The codes."""
        del spec
        return Codebook(self.codes, payloads[self.modality].size)

    def apply(self, model: Any, module: nn.Module, payload: Array) -> Array:
        """Numbers."""
        known = dict(model.payloads)[self.modality]
        return module(known.normalize(payload))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call."""
        yield (sample.particles[self.modality].payload,)


@dataclass(frozen=True)
class FramewiseHead(HeadSpec):
    """(tokens, particles, moments) -> a modality's channels at moments [B, M] of no payload,
    float32 [B, M, C], and at which some particle stands, bool [B, M].

    particles: those that the tokens are of.
    """

    modality: str

    def build(self, spec: ModelSpec, payloads: Mapping[str, Payload]) -> nn.Module:
        """A small network on the mean of what covers a moment."""
        known = payloads[self.modality]
        return Moment(spec.width, known.size // known.base[0], _dtype(spec))

    def apply(
        self,
        model: Any,
        module: nn.Module,
        tokens: Tokens,
        particles: Mapping[str, Particles],
        moments: Particles,
    ) -> tuple[Array, Array]:
        """Channels and what is covered."""
        names = [name for name, _ in model.payloads if name in particles]
        extent = jnp.concatenate([particles[name].extent for name in names], axis=1)
        return module(tokens, extent, moments.place, moments.extent, moments.segment)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One call."""
        yield sample.tokens, sample.particles, sample.particles[self.modality]


def classification(outputs: int) -> dict[str, HeadSpec]:
    """The two parts of a classification head; none where there is nothing to tell apart."""
    return {"head_norm": NormHead(), "head": ClassifierHead(outputs)} if outputs else {}


def _dtype(spec: ModelSpec) -> Any:
    return precision.PRECISIONS[spec.dtype].compute


def part_of(tokens: Tokens, particles: Mapping[str, Particles], modality: str) -> Array:
    """The tokens [B, l, D] of one modality's slots, where nothing reduced them: modalities stand in
    the order of `config.modalities`.
    """
    names = ordered(particles)
    start = sum(particles[name].segment.shape[1] for name in names[: names.index(modality)])
    return tokens.x[:, start : start + particles[modality].segment.shape[1]]
