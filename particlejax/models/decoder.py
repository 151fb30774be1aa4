# SPDX-License-Identifier: Apache-2.0
"""The decoder: predicts masked particles at their positions.

Legend: B rows, L slots, Q queries, D width, P payload.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from particlejax.config.model import ModelSpec
from particlejax.models.modality import ModalitySpec
from particlejax.nn import attention, embed, precision, transformer
from particlejax.nn.dense import Dense
from particlejax.nn.token_reduction import Tokens
from particlejax.particles.types import Particles


class Decoder(nn.Module):
    """Cross-attention blocks from queries to tokens; queries do not see each other
    (arXiv:2401.14391).

    Returns payloads or, with `features`, encoder features. If a fusion keeps modalities separate,
    it reads only the tokens of the queried modality.
    """

    spec: ModelSpec
    payloads: tuple[tuple[str, ModalitySpec], ...]
    features: bool = False

    @nn.compact
    def __call__(self, tokens: Tokens, query: Particles, modality: str) -> Array:
        spec, dtype = self.spec, precision.PRECISIONS[self.spec.dtype].compute
        width = spec.decoder_width
        names = tuple(name for name, _ in self.payloads)
        if tokens.modality_id is not None and spec.fusion in ("late", "bottleneck"):
            tokens = tokens._replace(
                segment=jnp.where(tokens.modality_id == names.index(modality), tokens.segment, 0)
            )
        context = Dense(width, dtype=dtype, name="context")(tokens.x)
        x = embed.PositionEmbed(width, dtype, name="place")(query.place, query.extent)
        x = (x + embed.LearnedTokens(width, 1, name=f"modality_{modality}")()[None]).astype(dtype)
        body = transformer.Transformer(
            spec.decoder_depth,
            spec.decoder_num_heads,
            spec.mlp_ratio * width,
            block_config(spec)._replace(dropout=0.0),
            unroll_layers=spec.unroll_layers,
            remat_policy=spec.remat_policy,
            name="transformer",
        )
        decoded, _ = body(Tokens(x, query.place, query.segment), tokens._replace(x=context))
        if self.features:
            return Dense(spec.width, name="features")(decoded.x)
        payload = dict(self.payloads)[modality]
        return Dense(payload.vocabulary or payload.payload_size, name=f"payload_{modality}")(
            decoded.x
        )


def block_config(spec: ModelSpec) -> attention.BlockConfig:
    """Block settings of a model."""
    return attention.BlockConfig(
        spec.distance_bias,
        spec.rope,
        spec.qk_norm,
        spec.mlp_activation == "swiglu",
        spec.layer_scale,
        spec.dropout,
        precision.PRECISIONS[spec.dtype].compute,
        spec.attention_impl,
    )
