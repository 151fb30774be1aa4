# SPDX-License-Identifier: Apache-2.0
"""Heads: modules that an objective declares in addition to the encoder.

Each is a frozen dataclass that builds its linen module and defines how to apply it; call it by name
with `model.head(params, NAME, ...)`. Legend: B rows, L slots of all modalities, l of one, S clips
of a row, C outputs, Q queries, D width, E width of an embedding, P payload.
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
from particlejax.models.modality import ModalitySpec
from particlejax.nn import precision
from particlejax.nn.heads import Codebook, FramewiseMlp, LinearHead, Projection
from particlejax.nn.token_reduction import Tokens
from particlejax.particles.types import Particles


class Sample(NamedTuple):
    """Example inputs, used once to initialize the heads' parameters.

    particles: those that the encoder saw, by modality; all_particles: includes the unseen
    modalities.
    """

    tokens: Tokens
    num_clips: int
    particles: Mapping[str, Particles]
    all_particles: Mapping[str, Particles]


@dataclass(frozen=True)
class HeadSpec:
    """Base of all heads; `pools`: whether it needs one pooled vector per clip."""

    pools = False

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds the linen module."""
        raise NotImplementedError

    def apply(self, model: Any, module: nn.Module, *args: Any) -> Any:
        """Applies the module to the arguments; model: the bound `ParticleModel`."""
        raise NotImplementedError

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """Example calls that touch every parameter."""
        raise NotImplementedError


@dataclass(frozen=True)
class NormHead(HeadSpec):
    """(vectors [..., D]) -> layer-normalized vectors."""

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds a layer norm."""
        del payloads
        return nn.LayerNorm(dtype=_dtype(spec))

    def apply(self, model: Any, module: nn.Module, vectors: Array) -> Array:
        """Applies the layer norm."""
        del model
        return module(vectors)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call."""
        yield (sample.tokens.x.astype(jnp.float32),)


@dataclass(frozen=True)
class ClassifierHead(HeadSpec):
    """(tokens, clips) -> logits of each clip, float32 [B, S, C], from its vector as normalized by
    the head `head_norm`.
    """

    outputs: int
    pools = True

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds a linear layer, float32."""
        del spec, payloads
        return nn.Dense(self.outputs, kernel_init=nn.initializers.normal(0.02))

    def apply(self, model: Any, module: nn.Module, tokens: Tokens, num_clips: int) -> Array:
        """Computes the logits."""
        normalized = model.apply_head("head_norm", model.pool_clips(tokens, num_clips))
        return module(normalized).astype(jnp.float32)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call."""
        yield sample.tokens, sample.num_clips


@dataclass(frozen=True)
class ClipHead(HeadSpec):
    """(tokens, clips) -> logits of an objective's clip-level classification, float32 [B, S, C]."""

    outputs: int
    pools = True

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds a linear layer on the normalized vector of a clip."""
        del payloads
        return LinearHead(self.outputs, _dtype(spec))

    def apply(self, model: Any, module: nn.Module, tokens: Tokens, num_clips: int) -> Array:
        """Computes the logits."""
        return module(model.pool_clips(tokens, num_clips))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call."""
        yield sample.tokens, sample.num_clips


@dataclass(frozen=True)
class ParticleHead(HeadSpec):
    """(tokens, particles, modality) -> logits of each particle of a modality, float32 [B, l, C].

    particles: the particles of these tokens.
    """

    outputs: int

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds a linear layer on the normalized token."""
        del payloads
        return LinearHead(self.outputs, _dtype(spec))

    def apply(
        self,
        model: Any,
        module: nn.Module,
        tokens: Tokens,
        particles: Mapping[str, Particles],
        modality: str,
    ) -> Array:
        """Computes the logits."""
        del model
        return module(modality_tokens(tokens, particles, modality))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call."""
        yield sample.tokens, sample.particles, next(iter(sample.particles))


@dataclass(frozen=True)
class QueryHead(HeadSpec):
    """(tokens, query, modality) -> logits of masked particles, queried by position, float32 [B, Q,
    C].

    Uses the features from the head `predictor` (a `FeatureDecoderHead`).
    """

    outputs: int

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds a linear layer on the normalized feature."""
        del payloads
        return LinearHead(self.outputs, _dtype(spec))

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, query: Particles, modality: str
    ) -> Array:
        """Computes the logits."""
        return module(model.apply_head("predictor", tokens, query, modality))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call."""
        name, query = next(iter(sample.particles.items()))
        yield sample.tokens, query, name


@dataclass(frozen=True)
class DecoderHead(HeadSpec):
    """(tokens, query, modality) -> payloads [B, Q, P] at the positions and extents of the queries.

    Ignores the queries' own payload.
    """

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds the decoder."""
        return Decoder(spec, tuple((name, payloads[name]) for name in ordered(payloads)))

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, query: Particles, modality: str
    ) -> Array:
        """Predicts payloads or features."""
        del model
        return module(tokens, query, modality)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call per modality."""
        for name, particles in sample.all_particles.items():
            yield sample.tokens, particles, name


@dataclass(frozen=True)
class FeatureDecoderHead(DecoderHead):
    """(tokens, query, modality) -> predicted encoder features [B, Q, D] of the unmasked clip."""

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds the decoder with the encoder's width as its output."""
        return Decoder(
            spec, tuple((name, payloads[name]) for name in ordered(payloads)), features=True
        )


@dataclass(frozen=True)
class ProjectionHead(HeadSpec):
    """(tokens, clips, modality) -> contrastive embeddings, unit length, float32 [B, S, E]; logit
    scale and bias.
    """

    modalities: tuple[str, ...]
    pools = True

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds one projection per modality."""
        del payloads
        return Projection(spec.embed_dim, self.modalities, _dtype(spec))

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, num_clips: int, modality: str
    ) -> tuple[Array, Array, Array]:
        """Computes embeddings, scale and bias."""
        return module(model.pool_clips(tokens, num_clips), modality)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call per modality."""
        for name in self.modalities:
            yield sample.tokens, sample.num_clips, name


@dataclass(frozen=True)
class TokenProjectionHead(HeadSpec):
    """(tokens, modality) -> embedding of each token, float32 [B, L, E], to correlate two modalities
    in time; logit scale and bias.
    """

    modalities: tuple[str, ...]

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds one projection per modality, without unit length."""
        del payloads
        return Projection(
            spec.embed_dim, self.modalities, _dtype(spec), normalize=False, init_bias=0.0
        )

    def apply(
        self, model: Any, module: nn.Module, tokens: Tokens, modality: str
    ) -> tuple[Array, Array, Array]:
        """Computes embeddings, scale and bias."""
        del model
        return module(tokens.x, modality)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call per modality."""
        for name in self.modalities:
            yield sample.tokens, name


@dataclass(frozen=True)
class CodebookHead(HeadSpec):
    """(payload [B, L, P]) -> index of the nearest code, int32 [B, L]; without gradients."""

    modality: str
    codes: int

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds the codebook."""
        del spec
        return Codebook(self.codes, payloads[self.modality].payload_size)

    def apply(self, model: Any, module: nn.Module, payload: Array) -> Array:
        """Computes the indices."""
        payload_spec = dict(model.payloads)[self.modality]
        return module(payload_spec.normalize(payload))

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call."""
        yield (sample.particles[self.modality].payload,)


@dataclass(frozen=True)
class FramewiseHead(HeadSpec):
    """(tokens, particles, moments) -> a modality's channels at query times [B, M], float32 [B, M,
    C], and a mask of the times that some particle covers, bool [B, M].

    particles: the particles of these tokens.
    """

    modality: str

    def build(self, spec: ModelSpec, payloads: Mapping[str, ModalitySpec]) -> nn.Module:
        """Builds a small network on the mean of the covering tokens."""
        payload_spec = payloads[self.modality]
        return FramewiseMlp(
            spec.width, payload_spec.payload_size // payload_spec.patch_size[0], _dtype(spec)
        )

    def apply(
        self,
        model: Any,
        module: nn.Module,
        tokens: Tokens,
        particles: Mapping[str, Particles],
        moments: Particles,
    ) -> tuple[Array, Array]:
        """Computes channels and mask."""
        names = [name for name, _ in model.payloads if name in particles]
        extent = jnp.concatenate([particles[name].extent for name in names], axis=1)
        return module(tokens, extent, moments.place, moments.extent, moments.segment)

    def examples(self, sample: Sample) -> Iterator[tuple[Any, ...]]:
        """One example call."""
        yield sample.tokens, sample.particles, sample.particles[self.modality]


def classification(outputs: int) -> dict[str, HeadSpec]:
    """The two parts of a classification head; none without classes."""
    return {"head_norm": NormHead(), "head": ClassifierHead(outputs)} if outputs else {}


def _dtype(spec: ModelSpec) -> Any:
    return precision.PRECISIONS[spec.dtype].compute


def modality_tokens(tokens: Tokens, particles: Mapping[str, Particles], modality: str) -> Array:
    """The tokens [B, l, D] of one modality, if no token reduction ran: modalities follow the order
    of `config.modalities`.
    """
    names = ordered(particles)
    start = sum(particles[name].segment.shape[1] for name in names[: names.index(modality)])
    return tokens.x[:, start : start + particles[modality].segment.shape[1]]
