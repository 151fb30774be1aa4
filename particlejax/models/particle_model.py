# SPDX-License-Identifier: Apache-2.0
"""The model at the border: a pair of pure functions over the linen modules of the encoder, the
decoder and the heads.

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
from particlejax.config.model import ModelSpec
from particlejax.core.typing import Params
from particlejax.models import cnn_stem
from particlejax.nn import attention, embed, fusion, heads, precision, token_reduction, transformer
from particlejax.nn.dense import Dense
from particlejax.nn.token_reduction import Tokens
from particlejax.particles.normalize import PixelScale
from particlejax.particles.types import Batch, Particles


class Payload(NamedTuple):
    """What a modality's payloads are: `size` numbers, or ids below `vocabulary` where that is not
    0.

    base: frames, rows and columns of the cuboid that the numbers are of, in the order (t, h, w,
    channel); () for no cuboid. pixels: how uint8 pixels become those numbers; None where there are
    no pixels.
    """

    size: int
    vocabulary: int = 0
    base: tuple[int, ...] = ()
    pixels: PixelScale | None = None

    @property
    def still(self) -> float:
        """What the mean over a cuboid's frames is multiplied by."""
        return self.pixels.still if self.pixels else 1.0


class Needs(NamedTuple):
    """What objectives want of a model besides the encoder: a decoder, a predictor of features,
    questions about a clip with as many answers each, the modalities that are compared ((): none),
    and questions about each particle. codebooks: of which modalities, and of how many codes;
    traced: modalities whose every moment is told from the others; unseen: modalities that are asked
    for and never seen, which the encoder knows nothing of, so that it fits a stage without them.
    """

    decoder: bool = False
    predictor: bool = False
    questions: tuple[tuple[str, int], ...] = ()
    compared: tuple[str, ...] = ()
    each: tuple[tuple[str, int], ...] = ()
    codebooks: tuple[tuple[str, int], ...] = ()
    traced: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    laid: tuple[str, ...] = ()


_ENCODER = Needs()  # that alone


class Model(NamedTuple):
    """init(key, batch) -> params; apply(params, method, *args, key=None) -> what the method of
    `ParticleModel` returns.

    A key makes it training: dropout, stochastic depth and modality dropout happen only with one.
    """

    init: Callable[[Array, Batch], Params]
    apply: Callable[..., Any]
    payloads: Mapping[str, Payload]

    def normalize(self, batch: Batch) -> Batch:
        """The batch with pixels as the model computes with them, float32; a normalized one
        as it is.

        `encode` does this by itself. Call it first to compare with pixels (targets, attacks).
        """
        return replace(batch, particles=normalize(batch.particles, self.payloads))


def build(
    spec: ModelSpec, payloads: Mapping[str, Payload], *, classes: int = 0, needs: Needs = _ENCODER
) -> Model:
    """The model of a spec for these modalities; with a classification head where classes > 0.

    Raises UserError where the stem cannot read the payloads.
    """
    if spec.stem.network:
        cnn_stem.check(
            spec.stem, payloads[cnn_stem.VISION].base if cnn_stem.VISION in payloads else ()
        )
    module = ParticleModel(spec, tuple(sorted(payloads.items())), classes, needs)

    def init(key: Array, batch: Batch) -> Params:
        return module.init(key, batch)["params"]

    def apply(params: Params, method: str, *args: Any, key: Array | None = None) -> Any:
        rngs = {} if key is None else {"dropout": key}
        return module.apply({"params": params}, *args, method=method, rngs=rngs)

    return Model(init, apply, dict(payloads))


def normalize(
    particles: Mapping[str, Particles], payloads: Mapping[str, Payload]
) -> dict[str, Particles]:
    """Particles with uint8 pixels made float32 by their modality's mean and deviation.

    Anything but uint8 stays as it is, so that doing it twice changes nothing. Raises ValueError for
    uint8 of a modality that has no `pixels`.
    """
    found = dict(particles)
    for name, given in particles.items():
        if given.payload.dtype == jnp.uint8:
            found[name] = replace(given, payload=_to_payload(given.payload, payloads[name], name))
    return found


def _to_payload(pixels: Array, payload: Payload, modality: str) -> Array:
    if payload.pixels is None:
        raise ValueError(
            f"modality {modality!r} has uint8 pixels and the model does not know their mean and "
            "deviation: give its Payload `pixels`, a PixelScale."
        )
    return payload.pixels.to_payload(pixels)


class ParticleModel(nn.Module):
    """Particles of any modalities -> one token sequence -> Transformer; decoder and heads are parts
    of their own.
    """

    spec: ModelSpec
    payloads: tuple[tuple[str, Payload], ...]
    classes: int
    needs: Needs

    def setup(self) -> None:
        spec, dtype, needs = self.spec, precision.PRECISIONS[self.spec.dtype].compute, self.needs
        self.encoder = Encoder(
            spec, tuple(each for each in self.payloads if each[0] not in needs.unseen)
        )
        if needs.decoder:
            self.decoder = Decoder(spec, self.payloads)
        if needs.predictor:
            self.predictor = Decoder(spec, self.payloads, features=True)
        if spec.pool == "attention" and (self.classes or needs.questions or needs.compared):
            self.pool = heads.AttentivePool(spec.pool_heads, dtype)
        if self.classes:
            self.head_norm = nn.LayerNorm(dtype=dtype)
            self.head = nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.02))
        self.questions = {name: heads.Question(count, dtype) for name, count in needs.questions}
        self.each = {name: heads.Question(count, dtype) for name, count in needs.each}
        if needs.compared:
            self.compare = heads.Embed(spec.embedding, needs.compared, dtype)
        if needs.laid:
            self.lag = heads.Embed(spec.embedding, needs.laid, dtype, unit=False, bias=0.0)
        known = dict(self.payloads)
        self.codebook = {
            name: heads.Codebook(count, known[name].size) for name, count in needs.codebooks
        }
        self.moment = {
            name: heads.Moment(spec.width, known[name].size // known[name].base[0], dtype)
            for name in needs.traced
        }

    def __call__(self, batch: Batch) -> None:
        """Touches every parameter once, for `init`."""
        clips = batch.label.shape[1]
        seen = {
            name: each for name, each in batch.particles.items() if name not in self.needs.unseen
        }
        tokens, _ = self.encode(seen, clips)
        for part in ("decode", "predict"):
            if getattr(self.needs, {"decode": "decoder", "predict": "predictor"}[part]):
                for name, particles in batch.particles.items():
                    getattr(self, part)(tokens, particles, name)
        if self.classes:
            self.classify(tokens, clips)
        for name, _ in self.needs.questions:
            self.ask(tokens, clips, name)
        for name, _ in self.needs.each:
            self.ask_each(tokens, seen, next(iter(seen)), name)
        for name in self.needs.compared:
            self.embed(tokens, clips, name)
        for name in self.needs.laid:
            self.lay(tokens, name)
        for name, _ in self.needs.codebooks:
            self.code(seen[name].payload, name)
        for name in self.needs.traced:
            self.trace(tokens, seen, seen[name], name)

    def encode(
        self, particles: Mapping[str, Particles], clips: int | None = None
    ) -> tuple[Tokens, dict[str, tuple[Array, ...]]]:
        """Tokens of all particles, and under 'blocks' every block's output, as `Transformer` gives
        them.

        Pixels are uint8, and normalized here; float32 where `Model.normalize` has done so before.
        clips: S, which latents, class tokens and modality dropout want to know.
        """
        return self.encoder(normalize(particles, dict(self.payloads)), clips)

    def decode(self, tokens: Tokens, query: Particles, modality: str) -> Array:
        """Payloads [B, Q, P] at the queries' places and extents; their own payload is not looked
        at.
        """
        return self.decoder(tokens, query, modality)

    def predict(self, tokens: Tokens, query: Particles, modality: str) -> Array:
        """Features [B, Q, D] as an encoder that saw everything would give them there."""
        return self.predictor(tokens, query, modality)

    def pooled(self, tokens: Tokens, clips: int) -> Array:
        """One vector a clip, float32 [B, S, D], pooled as the spec says."""
        if self.spec.pool == "token":
            return tokens.whole.astype(jnp.float32)
        if self.spec.pool == "attention":
            return self.pool(tokens.x, tokens.segment, clips)
        return losses.clip_mean(
            tokens.x.astype(jnp.float32), tokens.segment, clips, self._mass(tokens, clips)
        )

    def _mass(self, tokens: Tokens, clips: int) -> Array | None:
        """Where modalities keep to themselves each counts alike, however many tokens it has."""
        if tokens.kind is None or self.spec.fusion != "late":
            return tokens.mass
        kinds = jax.nn.one_hot(tokens.kind, len(self.payloads))
        member = losses.membership(tokens.segment, clips)
        number = jnp.einsum("bls,blk->bsk", member, kinds)
        return 1 / jnp.maximum(jnp.einsum("bls,blk,bsk->bl", member, kinds, number), 1.0)

    def classify(self, tokens: Tokens, clips: int) -> Array:
        """Logits of each clip, float32 [B, S, C]."""
        return self.head(self.head_norm(self.pooled(tokens, clips))).astype(jnp.float32)

    def ask(self, tokens: Tokens, clips: int, question: str) -> Array:
        """Logits of an objective's own question about each clip, float32 [B, S, C]."""
        return self.questions[question](self.pooled(tokens, clips))

    def ask_each(
        self, tokens: Tokens, particles: Mapping[str, Particles], modality: str, question: str
    ) -> Array:
        """Logits of an objective's own question about each particle of a modality, float32 [B, l,
        C].
        """
        return self.each[question](part_of(tokens, particles, modality))

    def ask_hidden(self, tokens: Tokens, query: Particles, modality: str, question: str) -> Array:
        """Logits of the same about particles that were not shown, at the queries' places, float32
        [B, Q, C].
        """
        return self.each[question](self.predict(tokens, query, modality))

    def code(self, payload: Array, modality: str) -> Array:
        """The number of the code nearest to each payload, int32 [B, L]; nothing learns from it."""
        if payload.dtype == jnp.uint8:
            payload = _to_payload(payload, dict(self.payloads)[modality], modality)
        return self.codebook[modality](payload)

    def trace(
        self, tokens: Tokens, particles: Mapping[str, Particles], moments: Particles, modality: str
    ) -> tuple[Array, Array]:
        """A modality's channels at moments [B, M] of no payload, float32 [B, M, C], and at which
        some particle stands, bool [B, M].

        particles: those that the tokens are of.
        """
        extent = jnp.concatenate(
            [particles[name].extent for name, _ in self.payloads if name in particles], axis=1
        )
        return self.moment[modality](tokens, extent, moments.place, moments.extent, moments.segment)

    def embed(self, tokens: Tokens, clips: int, modality: str) -> tuple[Array, Array, Array]:
        """Unit vectors of each clip, float32 [B, S, E], to be compared with another modality's;
        sharpness and bias of that.
        """
        return self.compare(self.pooled(tokens, clips), modality)

    def lay(self, tokens: Tokens, modality: str) -> tuple[Array, Array, Array]:
        """What of each token is laid over another modality's in time, float32 [B, L, E]; sharpness
        and bias of that.
        """
        return self.lag(tokens.x, modality)


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
                if spec.stem.network and name == cnn_stem.VISION:
                    read = cnn_stem.Stem(
                        spec.stem, payload.base, spec.width, dtype, name=f"payload_{name}"
                    )
                else:
                    read = embed.Payload(
                        spec.width, payload.vocabulary, dtype, name=f"payload_{name}"
                    )
                each = read(p.payload)
                # A vector under its own name, so that a stage may begin with a run that knew other
                # modalities, too.
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
        prompts = self.get_variable("params", "prompts")  # only where fine-tuning has put some
        first = count = 0
        if prompts is not None:
            tokens, count = self._prompted(tokens, prompts["token"], clips)
            parts = parts and parts._replace(lengths=(parts.lengths[0] + count, *parts.lengths[1:]))
        if parts:
            tokens, parts, first = self._lead(tokens, parts, clips)
        reduction = (
            token_reduction.Reduction(spec.reduce, spec.reduce_after, spec.reduce_keep)
            if spec.reduce_after
            else None
        )
        body = transformer.Transformer(
            spec.depth,
            spec.heads,
            spec.mlp * spec.width,
            style_of(spec),
            spec.drop_path,
            spec.unroll,
            reduction,
            spec.remat,
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
        """The parts of the row; None where all tokens read all and go through the same blocks."""
        spec = self.spec
        if spec.fusion == "early" and not spec.separate:
            if spec.pool != "token":
                return None
            names, lengths = ("all",), [sum(lengths)]
        return fusion.Parts(names, tuple(lengths), spec.fusion, spec.fuse_from, spec.separate)

    def _lead(
        self, tokens: Tokens, parts: fusion.Parts, clips: int | None
    ) -> tuple[Tokens, fusion.Parts, int]:
        """Puts each clip's class token and latents before its particles, in the middle of its
        places.
        """
        counts = {
            fusion.CLASS: self.spec.pool == "token",
            fusion.LATENTS: self.spec.latents * (self.spec.fusion == "bottleneck"),
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
        """The tokens behind learned ones of each clip, in the middle of its places; how many these
        are.
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
        """The particles' tokens alone, the class tokens beside them. What latents know the
        particles' tokens have read.
        """
        whole = (
            tokens.x[:, first - self._known(clips) : first] if self.spec.pool == "token" else None
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
        assert clips is not None, "encode wants to be told how many clips a row may hold"
        return clips


class Decoder(nn.Module):
    """Asks the tokens what is at a place: blocks of cross-attention, queries blind to each other
    (arXiv:2401.14391).

    It answers with payloads, or, for `features`, with what the encoder makes of them. Where a
    fusion keeps modalities apart it reads the asked one's tokens alone.
    """

    spec: ModelSpec
    payloads: tuple[tuple[str, Payload], ...]
    features: bool = False

    @nn.compact
    def __call__(self, tokens: Tokens, query: Particles, modality: str) -> Array:
        spec, dtype = self.spec, precision.PRECISIONS[self.spec.dtype].compute
        width = spec.decoder_width
        names = tuple(name for name, _ in self.payloads)
        if tokens.kind is not None and spec.fusion in ("late", "bottleneck"):
            tokens = tokens._replace(
                segment=jnp.where(tokens.kind == names.index(modality), tokens.segment, 0)
            )
        context = Dense(width, dtype=dtype, name="context")(tokens.x)
        x = embed.Place(width, dtype, name="place")(query.place, query.extent)
        x = (x + embed.Learned(width, 1, name=f"modality_{modality}")()[None]).astype(dtype)
        body = transformer.Transformer(
            spec.decoder_depth,
            spec.decoder_heads,
            spec.mlp * width,
            style_of(spec)._replace(dropout=0.0),
            unroll=spec.unroll,
            remat=spec.remat,
            name="transformer",
        )
        answers, _ = body(Tokens(x, query.place, query.segment), tokens._replace(x=context))
        if self.features:
            return Dense(spec.width, name="features")(answers.x)
        payload = dict(self.payloads)[modality]
        return Dense(payload.vocabulary or payload.size, name=f"payload_{modality}")(answers.x)


def style_of(spec: ModelSpec) -> attention.Style:
    """What the blocks of a model are made of."""
    return attention.Style(
        spec.near,
        spec.rotary,
        spec.qk_norm,
        spec.gate == "swiglu",
        spec.layer_scale,
        spec.dropout,
        precision.PRECISIONS[spec.dtype].compute,
        spec.attention,
    )


def part_of(tokens: Tokens, particles: Mapping[str, Particles], modality: str) -> Array:
    """The tokens [B, l, D] of one modality's slots, where nothing reduced them: modalities stand in
    the order of their names.
    """
    start = sum(each.segment.shape[1] for name, each in particles.items() if name < modality)
    return tokens.x[:, start : start + particles[modality].segment.shape[1]]


def parameter_shapes(model: Model, batch: Batch) -> Any:
    """Shapes of the parameters, without computing them."""
    return jax.eval_shape(model.init, jax.random.key(0), batch)
