# SPDX-License-Identifier: Apache-2.0
"""The model: its encoder, its decoder, and a CNN that may embed the pixels."""

import dataclasses

from particlejax.config.fields import Spec, at_least, between, one_of
from particlejax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class StemSpec(Spec):
    """A published 3D CNN that embeds the pixels of each vision particle (a sub-clip) as its token.

    It trains like the rest of the model; `finetune.freeze='payload_vision/network'` freezes it. Its
    batch normalization always uses the pretrained statistics.
    """

    # c3d, i3d, i3d_r50 or x3d_xs to x3d_l (models/zoo); '': a linear patch embedding
    model: str = ""
    endpoint: str = ""  # feature map whose mean is the token; '': the last one
    # initial weights: a file or the workdir of import_weights; '': from a Python package; 'random':
    # untrained
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class ModelSpec(Spec):
    """The encoder and, if an objective needs it, the decoder."""

    width: int = at_least(192, 1)  # token width of the encoder
    depth: int = at_least(6, 1)  # number of encoder blocks
    num_heads: int = at_least(3, 1)  # attention heads per encoder block
    distance_bias: bool = True  # learned attention bias per head against distance in time and space
    mlp_ratio: int = at_least(4, 1)  # hidden width of the MLP, as a multiple of the token width
    rope: bool = False  # rotary position embedding of queries and keys (nn/rope.py)
    qk_norm: bool = False  # normalize queries and keys (arXiv:2302.05442)
    mlp_activation: str = one_of("gelu", "swiglu")  # activation of the MLP
    # initial LayerScale factor of residual branches (arXiv:2103.17239); 0: no LayerScale
    layer_scale: float = at_least(0.0, 0)
    # how modalities attend to each other (nn/fusion.py)
    fusion: str = one_of("early", "bottleneck", "late", "cross")
    fusion_layer: int = at_least(0, 0)  # index of the first fusion block, for bottleneck and cross
    # bottleneck tokens per clip, for fusion bottleneck (arXiv:2107.00135)
    num_bottlenecks: int = at_least(4, 1)
    share_encoder: bool = True  # whether all modalities share the encoder blocks
    # probability of dropping a modality of a training clip; at least one stays
    modality_dropout: float = between(0.0, 0, 1)
    stem: StemSpec = StemSpec()  # embedding of vision particles
    dropout: float = between(0.0, 0, 1, open_at="most")  # dropout rate within blocks
    # stochastic depth rate of the last block, linear from 0 (arXiv:1603.09382)
    drop_path_rate: float = between(0.0, 0, 1, open_at="most")
    # token reduction after the blocks `token_reduction_layers` (nn/token_reduction.py)
    token_reduction: str = one_of("prune", "merge")
    # ascending block numbers, from 1; (): no token reduction
    token_reduction_layers: tuple[int, ...] = at_least((), 1)
    # fraction of a clip's tokens that each reduction keeps
    token_keep_rate: float = between(0.5, 0, 1, open_at="least most")
    # pooling of a clip's tokens for classification
    pool_type: str = one_of("mean", "attention", "cls")
    pool_num_heads: int = at_least(8, 1)  # heads of attention pooling
    embed_dim: int = at_least(128, 1)  # width of clip embeddings for contrastive objectives
    decoder_width: int = at_least(128, 1)  # token width of the decoder
    decoder_depth: int = at_least(2, 1)  # number of decoder blocks
    decoder_num_heads: int = at_least(2, 1)  # attention heads per decoder block
    # attention kernel; auto: the fastest one of the device (nn/fused_attention.py)
    attention_impl: str = one_of("auto", "xla", "splash", "cudnn")
    # unroll the layer loop: faster and less memory, but slower to compile
    unroll_layers: bool = True
    # compute dtype; parameters and reductions stay float32 (nn/precision.py)
    dtype: str = one_of("float32", "bfloat16")
    # activations that the backward pass recomputes (nn/precision.py)
    remat_policy: str = one_of("none", "full", "dots_no_batch", "dots")

    def check(self) -> None:
        """Raises UserError for contradictory settings."""
        if self.width % self.num_heads or self.decoder_width % self.decoder_num_heads:
            raise UserError(
                f"ModelSpec.width={self.width} and decoder_width={self.decoder_width} must be "
                f"multiples of num_heads={self.num_heads} and "
                f"decoder_num_heads={self.decoder_num_heads}."
            )
        if self.pool_type == "attention" and self.width % self.pool_num_heads:
            raise UserError(
                f"ModelSpec.width={self.width} is not a multiple of "
                f"pool_num_heads={self.pool_num_heads}: change one of them."
            )
        edges = (0, *self.token_reduction_layers, self.depth)
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise UserError(
                f"ModelSpec.token_reduction_layers={self.token_reduction_layers} must be ascending "
                f"block numbers between 1 and {self.depth - 1}, or empty."
            )
        if self.token_reduction_layers and (
            self.fusion != "early" or not self.share_encoder or self.pool_type == "cls"
        ):
            raise UserError(
                "ModelSpec.token_reduction_layers reorders tokens, so it needs fusion='early', "
                "share_encoder=True and pool_type 'mean' or 'attention': set these, or leave it "
                "empty."
            )
        # bottleneck tokens pass information on one block later
        last = self.depth - (2 if self.fusion == "bottleneck" else 1)
        if self.fusion_layer > last and self.fusion != "early":
            raise UserError(
                f"ModelSpec.fusion_layer={self.fusion_layer} is too late for {self.depth} blocks "
                f"and fusion {self.fusion!r}: use {last} or less."
            )
        least = 0.5 if self.token_reduction == "merge" else 0.0
        if not least <= self.token_keep_rate < 1 or not self.token_keep_rate:
            raise UserError(
                f"ModelSpec.token_keep_rate={self.token_keep_rate:g} must be below 1 and "
                + ("at least 0.5, as tokens merge in pairs." if least else "above 0.")
            )
