# SPDX-License-Identifier: Apache-2.0
"""The model's functional interface: a pair of pure functions over the linen modules of encoder,
decoder and heads.

Legend: B rows, L slots of all modalities together, D width, S clips of a row, C classes, Q queries,
P payload, E width of an embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses
from particlejax.config.modalities import ordered
from particlejax.config.model import ModelSpec
from particlejax.core.typing import Params
from particlejax.models import cnn_stem
from particlejax.models.decoder import style_of
from particlejax.models.heads import HeadSpec, Sample
from particlejax.models.modality import Payload
from particlejax.nn import embed, fusion, precision, token_reduction, transformer
from particlejax.nn.heads import AttentivePool
from particlejax.nn.token_reduction import Tokens
from particlejax.particles.types import Batch, Particles


class Model(NamedTuple):
    """init(key, batch) -> params; apply(params, method, *args, key=None) -> the result of the
    method of `ParticleModel`.

    A key enables training mode: dropout, stochastic depth and modality dropout.
    """

    init: Callable[[Array, Batch], Params]
    apply: Callable[..., Any]
    payloads: Mapping[str, Payload]

    def encode(
        self,
        params: Params,
        particles: Mapping[str, Particles],
        clips: int | None = None,
        key: Array | None = None,
    ) -> Tokens:
        """Tokens of all particles; pixels may be uint8. See `ParticleModel.encode`."""
        return self.apply(params, "encode", particles, clips, key=key)[0]

    def head(self, params: Params, name: str, *args: Any) -> Any:
        """The output of the named head for `args`; see the head's class in models/heads.py."""
        return self.apply(params, "apply_head", name, *args)

    def normalize(self, batch: Batch) -> Batch:
        """The batch with pixels normalized to float32; a normalized batch is unchanged.

        `encode` does this by itself. Call it first if you compare with pixels (targets, attacks).
        """
        return replace(batch, particles=normalize(batch.particles, self.payloads))


def build(
    spec: ModelSpec,
    payloads: Mapping[str, Payload],
    heads: Mapping[str, HeadSpec] | None = None,
    unseen: tuple[str, ...] = (),
) -> Model:
    """The model of a spec for these modalities, with the heads that its objectives declare.

    unseen: modalities that are only targets. The encoder has no parameters for them, so it fits a
    stage without them. Raises UserError if the stem cannot read the payloads.
    """
    if spec.stem.model:
        cnn_stem.check(
            spec.stem, payloads[cnn_stem.VISION].base if cnn_stem.VISION in payloads else ()
        )
    module = ParticleModel(
        spec,
        tuple((name, payloads[name]) for name in ordered(payloads)),
        tuple(sorted((heads or {}).items())),
        unseen,
    )

    def init(key: Array, batch: Batch) -> Params:
        return module.init(key, batch)["params"]

    def apply(params: Params, method: str, *args: Any, key: Array | None = None) -> Any:
        rngs = {} if key is None else {"dropout": key}
        return module.apply({"params": params}, *args, method=method, rngs=rngs)

    return Model(init, apply, dict(payloads))


def normalize(
    particles: Mapping[str, Particles], payloads: Mapping[str, Payload]
) -> dict[str, Particles]:
    """Particles with uint8 pixels normalized to float32; idempotent."""
    return {
        name: replace(given, payload=payloads[name].normalize(given.payload))
        for name, given in particles.items()
    }


class ParticleModel(nn.Module):
    """Particles of any modalities -> one token sequence -> Transformer -> heads."""

    spec: ModelSpec
    payloads: tuple[tuple[str, Payload], ...]
    heads: tuple[tuple[str, HeadSpec], ...]
    unseen: tuple[str, ...] = ()

    def setup(self) -> None:
        self.encoder = Encoder(
            self.spec, tuple(item for item in self.payloads if item[0] not in self.unseen)
        )
        if self.spec.pool_type == "attention" and any(head.pools for _, head in self.heads):
            dtype = precision.PRECISIONS[self.spec.dtype].compute
            self.pool = AttentivePool(self.spec.pool_num_heads, dtype)
        for name, head in self.heads:
            setattr(self, name, head.build(self.spec, dict(self.payloads)))

    def __call__(self, batch: Batch) -> None:
        """Touches every parameter once, for `init`."""
        clips = batch.label.shape[1]
        given = normalize(batch.particles, dict(self.payloads))
        seen = {name: each for name, each in given.items() if name not in self.unseen}
        tokens, _ = self.encode(seen, clips)
        for name, head in self.heads:
            for args in head.examples(Sample(tokens, clips, seen, given)):
                self.apply_head(name, *args)

    def apply_head(self, name: str, *args: Any) -> Any:
        """The output of the named head for `args`."""
        return dict(self.heads)[name].apply(self, getattr(self, name), *args)

    def encode(
        self, particles: Mapping[str, Particles], clips: int | None = None
    ) -> tuple[Tokens, dict[str, tuple[Array, ...]]]:
        """Tokens of all particles, and under 'blocks' the outputs of all blocks, as `Transformer`
        returns them.

        Normalizes uint8 pixels; float32 pixels must come from `Model.normalize`. clips: S, needed
        by bottleneck tokens, class tokens and modality dropout.
        """
        return self.encoder(normalize(particles, dict(self.payloads)), clips)

    def pooled(self, tokens: Tokens, clips: int) -> Array:
        """One vector per clip, float32 [B, S, D], pooled as the spec says."""
        if self.spec.pool_type == "cls":
            return tokens.whole.astype(jnp.float32)
        if self.spec.pool_type == "attention":
            return self.pool(tokens.x, tokens.segment, clips)
        return losses.clip_mean(
            tokens.x.astype(jnp.float32), tokens.segment, clips, self._mass(tokens, clips)
        )

    def _mass(self, tokens: Tokens, clips: int) -> Array | None:
        """Weights for pooling; under late fusion each modality has equal weight, whatever its token
        count.
        """
        if tokens.kind is None or self.spec.fusion != "late":
            return tokens.mass
        kinds = jax.nn.one_hot(tokens.kind, len(self.payloads))
        member = losses.membership(tokens.segment, clips)
        number = jnp.einsum("bls,blk->bsk", member, kinds)
        return 1 / jnp.maximum(jnp.einsum("bls,blk,bsk->bl", member, kinds, number), 1.0)


class Encoder(nn.Module):
    """Embeds the particles of every modality and runs the Transformer over all of them."""

    spec: ModelSpec
    payloads: tuple[tuple[str, Payload], ...]

    @nn.compact
    def __call__(
        self, particles: Mapping[str, Particles], clips: int | None = None
    ) -> tuple[Tokens, dict[str, tuple[Array, ...]]]:
        spec, dtype = self.spec, precision.PRECISIONS[self.spec.dtype].compute
        place = embed.Place(spec.width, dtype, name="place")
        content = []
        for name, payload in self.payloads:
            if name in particles:
                p = particles[name]
                if spec.stem.model and name == cnn_stem.VISION:
                    read = cnn_stem.Stem(
                        spec.stem, payload.base, spec.width, dtype, name=f"payload_{name}"
                    )
                else:
                    read = embed.Payload(
                        spec.width, payload.vocabulary, dtype, name=f"payload_{name}"
                    )
                each = read(p.payload)
                # A parameter per modality name, so that a stage may start from a run with other
                # modalities.
                kind = embed.Learned(spec.width, 1, name=f"modality_{name}")()
                content.append((each + place(p.place, p.extent) + kind[None]).astype(dtype))
        names = tuple(name for name, _ in self.payloads if name in particles)
        places = jnp.concatenate([particles[name].place for name in names], axis=1)
        segments = [particles[name].segment for name in names]
        if spec.modality_dropout and self.has_rng("dropout"):
            segments = fusion.hide(
                self.make_rng("dropout"), segments, self._known(clips), spec.modality_dropout
            )
        tokens = Tokens(jnp.concatenate(content, axis=1), places, jnp.concatenate(segments, axis=1))
        parts = self._parts(names, [each.shape[1] for each in segments])
        prompts = self.get_variable("params", "prompts")  # present only if fine-tuning added it
        first = count = 0
        if prompts is not None:
            tokens, count = self._prompted(tokens, prompts["token"], clips)
            parts = parts and parts._replace(lengths=(parts.lengths[0] + count, *parts.lengths[1:]))
        if parts:
            tokens, parts, first = self._lead(tokens, parts, clips)
        reduction = (
            token_reduction.Reduction(
                spec.token_reduction, spec.token_reduction_layers, spec.token_keep_rate
            )
            if spec.token_reduction_layers
            else None
        )
        body = transformer.Transformer(
            spec.depth,
            spec.num_heads,
            spec.mlp_ratio * spec.width,
            style_of(spec),
            spec.drop_path_rate,
            spec.unroll_layers,
            reduction,
            spec.remat_policy,
            name="transformer",
        )
        tokens, blocks = body(tokens, parts=parts)
        if parts:
            tokens, blocks = (
                self._without(tokens, first, clips),
                tuple(each[:, :, first:] for each in blocks),
            )
        if count:
            tokens = tokens._replace(
                **{key: getattr(tokens, key)[:, count:] for key in ("x", "place", "segment")}
            )
            blocks = tuple(each[:, :, count:] for each in blocks)
        if parts:
            tokens = tokens._replace(kind=self._kinds(names, segments))
        return tokens, {"blocks": blocks}

    def _parts(self, names: tuple[str, ...], lengths: list[int]) -> fusion.Parts | None:
        """The parts of the row; None if all tokens attend to all and share their blocks."""
        spec = self.spec
        if spec.fusion == "early" and spec.share_encoder:
            if spec.pool_type != "cls":
                return None
            names, lengths = ("all",), [sum(lengths)]
        return fusion.Parts(
            names, tuple(lengths), spec.fusion, spec.fusion_layer, not spec.share_encoder
        )

    def _lead(
        self, tokens: Tokens, parts: fusion.Parts, clips: int | None
    ) -> tuple[Tokens, fusion.Parts, int]:
        """Prepends class and bottleneck tokens of each clip, positioned at the clip's mean."""
        counts = {
            fusion.CLASS: self.spec.pool_type == "cls",
            fusion.LATENTS: self.spec.num_bottlenecks * (self.spec.fusion == "bottleneck"),
        }
        first, names, lengths = 0, (), ()
        for name, count in counts.items():
            if count:
                learned = embed.Learned(self.spec.width, int(count), name=name)()
                tokens, more = self._prompted(tokens, learned, clips)
                first, names, lengths = first + more, (name, *names), (more, *lengths)
        return (
            tokens,
            parts._replace(names=names + parts.names, lengths=lengths + parts.lengths),
            first,
        )

    def _prompted(self, tokens: Tokens, learned_ZD: Array, clips: int | None) -> tuple[Tokens, int]:
        """Prepends learned tokens to each clip, positioned at the clip's mean; also returns their
        number.
        """
        number, count = self._known(clips), len(learned_ZD)
        member = losses.membership(tokens.segment, number)
        middle = losses.clip_mean(tokens.place, tokens.segment, number)
        segment = jnp.where(member.any(axis=1), jnp.arange(1, number + 1)[None], 0)
        x = jnp.broadcast_to(
            jnp.tile(learned_ZD, (number, 1)), (tokens.x.shape[0], number * count, self.spec.width)
        )
        lead = Tokens(
            x.astype(tokens.x.dtype),
            *(jnp.repeat(each, count, axis=1) for each in (middle, segment)),
        )
        return Tokens(
            *(jnp.concatenate(pair, axis=1) for pair in zip(lead[:3], tokens[:3], strict=True))
        ), number * count

    def _without(self, tokens: Tokens, first: int, clips: int | None) -> Tokens:
        """The particles' tokens without prepended ones, with the class tokens beside them."""
        whole = (
            tokens.x[:, first - self._known(clips) : first]
            if self.spec.pool_type == "cls"
            else None
        )
        x, place, segment = (each[:, first:] for each in tokens[:3])
        return Tokens(x, place, segment, whole=whole)

    def _kinds(self, names: tuple[str, ...], segments: list[Array]) -> Array:
        known = [name for name, _ in self.payloads]
        return jnp.concatenate(
            [
                jnp.full_like(each, known.index(name))
                for name, each in zip(names, segments, strict=True)
            ],
            axis=1,
        )

    def _known(self, clips: int | None) -> int:
        assert clips is not None, "encode needs `clips`, the maximum number of clips in a row"
        return clips


def parameter_shapes(model: Model, batch: Batch) -> Any:
    """Shapes of the parameters, without computing them."""
    return jax.eval_shape(model.init, jax.random.key(0), batch)
