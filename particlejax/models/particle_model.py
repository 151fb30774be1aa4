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
from particlejax.models.decoder import block_config
from particlejax.models.heads import HeadSpec, Sample
from particlejax.models.modality import ModalitySpec
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
    payloads: Mapping[str, ModalitySpec]

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
    payloads: Mapping[str, ModalitySpec],
    heads: Mapping[str, HeadSpec] | None = None,
    unseen: tuple[str, ...] = (),
) -> Model:
    """The model of a spec for these modalities, with the heads that its objectives declare.

    unseen: modalities that are only targets. The encoder has no parameters for them, so it fits a
    stage without them. Raises UserError if the stem cannot read the payloads.
    """
    if spec.stem.model:
        cnn_stem.check_stem(
            spec.stem, payloads[cnn_stem.VISION].patch_size if cnn_stem.VISION in payloads else ()
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
    particles: Mapping[str, Particles], payloads: Mapping[str, ModalitySpec]
) -> dict[str, Particles]:
    """Particles with uint8 pixels normalized to float32; idempotent."""
    return {
        name: replace(given, payload=payloads[name].normalize(given.payload))
        for name, given in particles.items()
    }


class ParticleModel(nn.Module):
    """Particles of any modalities -> one token sequence -> Transformer -> heads."""

    spec: ModelSpec
    payloads: tuple[tuple[str, ModalitySpec], ...]
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
        num_clips = batch.label.shape[1]
        all_particles = normalize(batch.particles, dict(self.payloads))
        visible = {
            name: modality_particles
            for name, modality_particles in all_particles.items()
            if name not in self.unseen
        }
        tokens, _ = self.encode(visible, num_clips)
        for name, head in self.heads:
            for args in head.examples(Sample(tokens, num_clips, visible, all_particles)):
                self.apply_head(name, *args)

    def apply_head(self, name: str, *args: Any) -> Any:
        """The output of the named head for `args`."""
        return dict(self.heads)[name].apply(self, getattr(self, name), *args)

    def encode(
        self, particles: Mapping[str, Particles], num_clips: int | None = None
    ) -> tuple[Tokens, dict[str, tuple[Array, ...]]]:
        """Tokens of all particles, and under 'blocks' the outputs of all blocks, as `Transformer`
        returns them.

        Normalizes uint8 pixels; float32 pixels must come from `Model.normalize`. num_clips: S,
        needed by bottleneck tokens, class tokens and modality dropout.
        """
        return self.encoder(normalize(particles, dict(self.payloads)), num_clips)

    def pool_clips(self, tokens: Tokens, num_clips: int) -> Array:
        """One vector per clip, float32 [B, S, D], pooled as the spec says."""
        if self.spec.pool_type == "cls":
            return tokens.cls.astype(jnp.float32)
        if self.spec.pool_type == "attention":
            return self.pool(tokens.x, tokens.segment, num_clips)
        return losses.clip_mean(
            tokens.x.astype(jnp.float32),
            tokens.segment,
            num_clips,
            self._token_weight(tokens, num_clips),
        )

    def _token_weight(self, tokens: Tokens, num_clips: int) -> Array | None:
        """Weights for pooling; under late fusion each modality has equal weight, whatever its token
        count.
        """
        if tokens.modality_id is None or self.spec.fusion != "late":
            return tokens.size
        modality_one_hot = jax.nn.one_hot(tokens.modality_id, len(self.payloads))
        membership = losses.membership(tokens.segment, num_clips)
        tokens_per_modality = jnp.einsum("bls,blk->bsk", membership, modality_one_hot)
        return 1 / jnp.maximum(
            jnp.einsum("bls,blk,bsk->bl", membership, modality_one_hot, tokens_per_modality), 1.0
        )


class Encoder(nn.Module):
    """Embeds the particles of every modality and runs the Transformer over all of them."""

    spec: ModelSpec
    payloads: tuple[tuple[str, ModalitySpec], ...]

    @nn.compact
    def __call__(
        self, particles: Mapping[str, Particles], num_clips: int | None = None
    ) -> tuple[Tokens, dict[str, tuple[Array, ...]]]:
        names = tuple(name for name, _ in self.payloads if name in particles)
        segments = self._visible_segments([particles[name].segment for name in names], num_clips)
        tokens = Tokens(  # x [B, L, D], place [B, L, 3], segment [B, L]
            jnp.concatenate(self._embed(particles), axis=1),
            jnp.concatenate([particles[name].place for name in names], axis=1),
            jnp.concatenate(segments, axis=1),
        )
        parts = self._row_parts(names, [segment.shape[1] for segment in segments])
        num_prompts = num_special = 0
        prompts = self.get_variable("params", "prompts")  # present only if fine-tuning added it
        if prompts is not None:
            tokens, num_prompts = self._prepend_learned(tokens, prompts["token"], num_clips)
            parts = parts and parts._replace(
                lengths=(parts.lengths[0] + num_prompts, *parts.lengths[1:])
            )
        if parts:
            tokens, parts, num_special = self._prepend_special_tokens(tokens, parts, num_clips)
        tokens, blocks = self._transformer()(tokens, parts=parts)
        if parts:
            tokens = self._strip_special_tokens(tokens, num_special, num_clips)
        if num_prompts:
            tokens = tokens._replace(
                **{key: getattr(tokens, key)[:, num_prompts:] for key in ("x", "place", "segment")}
            )
        if parts:
            tokens = tokens._replace(modality_id=self._modality_ids(names, segments))
        num_prepended = num_special + num_prompts
        return tokens, {"blocks": tuple(block[:, :, num_prepended:] for block in blocks)}

    def _embed(self, particles: Mapping[str, Particles]) -> list[Array]:
        """The embeddings of each modality's particles, [B, L, D] each."""
        spec, dtype = self.spec, precision.PRECISIONS[self.spec.dtype].compute
        place = embed.PositionEmbed(spec.width, dtype, name="place")
        embeddings = []
        for name, payload in self.payloads:
            if name not in particles:
                continue
            embedded = self._payload_embed(name, payload)(particles[name].payload)
            # A parameter per modality name, so that a stage may start from a run with other
            # modalities.
            modality_vector = embed.LearnedTokens(spec.width, 1, name=f"modality_{name}")()
            position = place(particles[name].place, particles[name].extent)
            embeddings.append((embedded + position + modality_vector[None]).astype(dtype))
        return embeddings

    def _payload_embed(self, name: str, payload: ModalitySpec) -> nn.Module:
        spec, dtype = self.spec, precision.PRECISIONS[self.spec.dtype].compute
        if spec.stem.model and name == cnn_stem.VISION:
            return cnn_stem.CNNStem(
                spec.stem, payload.patch_size, spec.width, dtype, name=f"payload_{name}"
            )
        return embed.PayloadEmbed(spec.width, payload.vocabulary, dtype, name=f"payload_{name}")

    def _visible_segments(self, segments: list[Array], num_clips: int | None) -> list[Array]:
        """Segments after modality dropout, which empties the slots of a clip's modality."""
        if not (self.spec.modality_dropout and self.has_rng("dropout")):
            return segments
        return fusion.drop_modalities(
            self.make_rng("dropout"),
            segments,
            self._require_num_clips(num_clips),
            self.spec.modality_dropout,
        )

    def _transformer(self) -> transformer.Transformer:
        spec = self.spec
        reduction = None
        if spec.token_reduction_layers:
            reduction = token_reduction.TokenReduction(
                spec.token_reduction, spec.token_reduction_layers, spec.token_keep_rate
            )
        return transformer.Transformer(
            spec.depth,
            spec.num_heads,
            spec.mlp_ratio * spec.width,
            block_config(spec),
            spec.drop_path_rate,
            spec.unroll_layers,
            reduction,
            spec.remat_policy,
            name="transformer",
        )

    def _row_parts(self, names: tuple[str, ...], lengths: list[int]) -> fusion.Parts | None:
        """The parts of the row; None if all tokens attend to all and share their blocks."""
        spec = self.spec
        if spec.fusion == "early" and spec.share_encoder:
            if spec.pool_type != "cls":
                return None
            names, lengths = ("all",), [sum(lengths)]
        return fusion.Parts(
            names, tuple(lengths), spec.fusion, spec.fusion_layer, not spec.share_encoder
        )

    def _prepend_special_tokens(
        self, tokens: Tokens, parts: fusion.Parts, num_clips: int | None
    ) -> tuple[Tokens, fusion.Parts, int]:
        """Prepends class and bottleneck tokens of each clip, positioned at the clip's mean."""
        counts = {
            fusion.CLASS: self.spec.pool_type == "cls",
            fusion.BOTTLENECKS: self.spec.num_bottlenecks * (self.spec.fusion == "bottleneck"),
        }
        num_special, names, lengths = 0, (), ()
        for name, count in counts.items():
            if count:
                learned = embed.LearnedTokens(self.spec.width, int(count), name=name)()
                tokens, num_added = self._prepend_learned(tokens, learned, num_clips)
                num_special, names, lengths = (
                    num_special + num_added,
                    (name, *names),
                    (num_added, *lengths),
                )
        return (
            tokens,
            parts._replace(names=names + parts.names, lengths=lengths + parts.lengths),
            num_special,
        )

    def _prepend_learned(
        self, tokens: Tokens, learned_ZD: Array, num_clips: int | None
    ) -> tuple[Tokens, int]:
        """Prepends learned tokens to each clip, positioned at the clip's mean; also returns their
        number.
        """
        num_clips_, tokens_per_clip = self._require_num_clips(num_clips), len(learned_ZD)
        membership = losses.membership(tokens.segment, num_clips_)
        center = losses.clip_mean(tokens.place, tokens.segment, num_clips_)
        segment = jnp.where(membership.any(axis=1), jnp.arange(1, num_clips_ + 1)[None], 0)
        x = jnp.broadcast_to(
            jnp.tile(learned_ZD, (num_clips_, 1)),
            (tokens.x.shape[0], num_clips_ * tokens_per_clip, self.spec.width),
        )
        learned_tokens = Tokens(
            x.astype(tokens.x.dtype),
            *(jnp.repeat(values, tokens_per_clip, axis=1) for values in (center, segment)),
        )
        return Tokens(
            *(
                jnp.concatenate(pair, axis=1)
                for pair in zip(learned_tokens[:3], tokens[:3], strict=True)
            )
        ), num_clips_ * tokens_per_clip

    def _strip_special_tokens(
        self, tokens: Tokens, num_special: int, num_clips: int | None
    ) -> Tokens:
        """The particles' tokens without prepended ones, with the class tokens beside them."""
        cls = (
            tokens.x[:, num_special - self._require_num_clips(num_clips) : num_special]
            if self.spec.pool_type == "cls"
            else None
        )
        x, place, segment = (values[:, num_special:] for values in tokens[:3])
        return Tokens(x, place, segment, cls=cls)

    def _modality_ids(self, names: tuple[str, ...], segments: list[Array]) -> Array:
        names_ = [name for name, _ in self.payloads]
        return jnp.concatenate(
            [
                jnp.full_like(segment, names_.index(name))
                for name, segment in zip(names, segments, strict=True)
            ],
            axis=1,
        )

    def _require_num_clips(self, num_clips: int | None) -> int:
        assert num_clips is not None, "encode needs num_clips, the maximum number of clips in a row"
        return num_clips


def parameter_shapes(model: Model, batch: Batch) -> Any:
    """Shapes of the parameters, without computing them."""
    return jax.eval_shape(model.init, jax.random.key(0), batch)
