# SPDX-License-Identifier: Apache-2.0
"""The settings of the model and of the objectives that train it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config import training
from particlejax.config.fields import Spec, at_least, between, interval, one_of
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
    # initial weights: a file, or the workdir of import_weights; '': from a Python package;
    # 'random': untrained
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


@dataclasses.dataclass(frozen=True)
class MaskSpec(Spec):
    """Masking of a modality, and the fraction of particles to predict."""

    weight: float = at_least(1.0, 0)  # weight of this loss
    modality: str = "vision"  # masked modality
    # mask type; motion masks particles with most change more often, low_variance those with least
    # content
    mask_type: str = one_of("tube", "random", "motion", "low_variance")
    mask_ratio: float = between(0.75, 0, 1)  # fraction of particles masked from the encoder
    target_ratio: float = between(0.5, 0, 1)  # fraction of particles to predict


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoderSpec(MaskSpec):
    """Masked autoencoder: the encoder sees the visible particles, the decoder predicts the masked
    ones.
    """

    norm_pix_loss: bool = True  # normalize targets per particle (arXiv:2111.06377, section 4.1)


@dataclasses.dataclass(frozen=True)
class ClassifySpec(Spec):
    """Classification: one class (softmax), several classes written 'a|b' (sigmoid), or a number
    (regression).
    """

    weight: float = at_least(1.0, 0)  # weight of this loss
    # softmax: one class per clip; sigmoid: several classes; regression: a number
    loss: str = one_of("softmax", "sigmoid", "regression")
    label_smoothing: float = between(0.0, 0, 1, open_at="most")  # label smoothing
    # gamma of the focal loss (arXiv:1708.02002); 0: cross-entropy
    focal_gamma: float = at_least(0.0, 0)
    # beta of class-balanced weights, such as 0.999 (arXiv:1901.05555); 0: equal weights
    class_balance_beta: float = between(0.0, 0, 0.9999999)
    # weight of R-Drop, the KL divergence of two dropout samples (arXiv:2106.14448); 0: none
    rdrop_weight: float = at_least(0.0, 0)


@dataclasses.dataclass(frozen=True)
class JepaSpec(MaskSpec):
    """JEPA: predict an EMA teacher's features of masked particles; needs stage key `ema_decay`."""


@dataclasses.dataclass(frozen=True)
class FeatureDistillationSpec(Spec):
    """Predict a published network's features of sub-clips (job extract_features) from the visible
    particles of `modality`.
    """

    weight: float = at_least(1.0, 0)  # weight of this loss
    modality: str = "vision"  # modality that the encoder sees
    # modality of the teacher's features; the encoder never sees it
    teacher_modality: str = "video_features"
    # mask type; motion masks particles with most change more often, low_variance those with least
    # content
    mask_type: str = one_of("random", "tube", "motion", "low_variance")
    mask_ratio: float = between(0.5, 0, 0.99)  # fraction of particles masked from the encoder
    # smooth L1, as in masked video distillation, or cosine distance
    loss: str = one_of("smooth_l1", "cosine")


@dataclasses.dataclass(frozen=True)
class FuturePredictionSpec(Spec):
    """Predict the particles after a split time from the particles before it."""

    weight: float = at_least(1.0, 0)  # weight of this loss
    modality: str = "vision"  # modality to predict
    # range of the split time, as fractions of the clip
    split_range: tuple[float, float] = interval((0.25, 0.75), 0, 1)
    # seconds to predict after the split; 0: to the end of the clip
    horizon: float = at_least(0.0, 0)
    # payloads normalized per particle, raw payloads, or the difference from the last visible frame
    target: str = one_of("norm_pix", "pixels", "residual")


@dataclasses.dataclass(frozen=True)
class ClipOrderSpec(Spec):
    """Predict the order of a clip's three shuffled parts (6 classes)."""

    weight: float = at_least(1.0, 0)  # weight of this loss


@dataclasses.dataclass(frozen=True)
class PlaybackSpeedSpec(Spec):
    """Predict how often a clip's speed was doubled; clips need at least 2 ** max_doublings
    particles in time.
    """

    weight: float = at_least(1.0, 0)  # weight of this loss
    max_doublings: int = between(1, 1, 4)  # maximum number of doublings


@dataclasses.dataclass(frozen=True)
class ArrowOfTimeSpec(Spec):
    """Predict whether a clip plays forward or backward."""

    weight: float = at_least(1.0, 0)  # weight of this loss


@dataclasses.dataclass(frozen=True)
class RotationFlipSpec(Spec):
    """Predict the rotation and flip of a clip (8 classes)."""

    weight: float = at_least(1.0, 0)  # weight of this loss


@dataclasses.dataclass(frozen=True)
class SynchronizationSpec(Spec):
    """Predict the time shift between two modalities, or whether the second is another clip's."""

    weight: float = at_least(1.0, 0)  # weight of this loss
    # reference and shifted modality; the same twice: left and right half of the frame
    modalities: tuple[str, str] = ("vision", "audio")
    # maximum shift in either direction, in steps: 2 * max_shift + 1 classes
    max_shift: int = at_least(2, 1)
    shift_stride: int = at_least(2, 1)  # particles of the second modality per step
    # joint: one encoder pass over both; correlation: correlate separately encoded modalities
    method: str = one_of("joint", "correlation")
    # fraction of rows whose second modality is another clip's; 0: none
    mismatch_prob: float = between(0.2, 0, 1)

    @property
    def laid(self) -> tuple[str, ...]:
        """Modalities whose time steps are correlated; () for method joint."""
        return self.modalities if self.method == "correlation" else ()


@dataclasses.dataclass(frozen=True)
class ContrastiveSpec(Spec):
    """Contrastive learning of clips between two modalities, or between two masked views of one
    modality.
    """

    weight: float = at_least(1.0, 0)  # weight of this loss
    # the two modalities; the same twice: two masked views
    modalities: tuple[str, str] = ("vision", "text")
    # InfoNCE over the batch, or a sigmoid per pair of clips
    loss: str = one_of("infonce", "sigmoid")
    mask_ratio: float = between(0.5, 0, 1)  # fraction of particles masked in each of two views


@dataclasses.dataclass(frozen=True)
class TextMatchingSpec(Spec):
    """Predict whether a text belongs to the clip or to another clip of the batch."""

    weight: float = at_least(1.0, 0)  # weight of this loss
    modality: str = "text"  # text modality
    mismatch_prob: float = between(0.5, 0, 1)  # fraction of clips paired with another clip's text
    # shifted: the next row's text; hard: sampled by the encoder's clip similarity
    negatives: str = one_of("shifted", "hard")


@dataclasses.dataclass(frozen=True)
class TemporalAlignmentSpec(Spec):
    """Predict the time of each particle of a modality from the others; its own time is masked."""

    weight: float = at_least(1.0, 0)  # weight of this loss
    modality: str = "text"  # modality whose times are predicted
    num_bins: int = at_least(8, 2)  # number of equal time bins of a clip


@dataclasses.dataclass(frozen=True)
class MaskedLmSpec(Spec):
    """Masked language modeling, given the rest of the clip."""

    weight: float = at_least(1.0, 0)  # weight of this loss
    modality: str = "text"  # masked modality of token ids
    mask_ratio: float = between(0.3, 0, 1)  # fraction of tokens to mask and predict


@dataclasses.dataclass(frozen=True)
class MaskedVisualTokensSpec(MaskSpec):
    """Masked prediction of visual tokens: k-means clusters of payloads, computed before the first
    step.
    """

    codebook_size: int = at_least(256, 2)  # number of clusters
    kmeans_samples: int = at_least(16384, 2)  # number of particles for k-means


@dataclasses.dataclass(frozen=True)
class FramewiseSpec(Spec):
    """Frame-wise regression or classification of a time series, or of a spectrogram, from the rest
    of the clip.
    """

    weight: float = at_least(1.0, 0)  # weight of this loss
    modality: str = one_of("timeseries", "audio")  # modality to predict at each time step
    # mse: regression; sigmoid: channels of 0 and 1, such as video summaries
    loss: str = one_of("mse", "sigmoid")


# Random keys and the sum of losses depend on this order: append new objectives.
OBJECTIVES = {
    "temporal_alignment": TemporalAlignmentSpec,
    "arrow_of_time": ArrowOfTimeSpec,
    "classify": ClassifySpec,
    "contrastive": ContrastiveSpec,
    "feature_distillation": FeatureDistillationSpec,
    "jepa": JepaSpec,
    "masked_autoencoder": MaskedAutoencoderSpec,
    "text_matching": TextMatchingSpec,
    "future_prediction": FuturePredictionSpec,
    "clip_order": ClipOrderSpec,
    "pseudo_label": training.PseudoLabelSpec,
    "playback_speed": PlaybackSpeedSpec,
    "synchronization": SynchronizationSpec,
    "framewise": FramewiseSpec,
    "rotation_flip": RotationFlipSpec,
    "masked_visual_tokens": MaskedVisualTokensSpec,
    "masked_lm": MaskedLmSpec,
}


def check_stage(
    objectives: Mapping[str, Any], tune: training.FinetuneSpec, model: ModelSpec, key_path: str
) -> None:
    """Raises UserError if objectives or fine-tuning settings contradict the model."""
    training.check_finetune(tune, model.pool_type, key_path)
    if (
        tune.method in ("lora", "ia3", "adapter", "prefix", "vpt_shallow", "vpt_deep")
        and not model.share_encoder
    ):
        raise UserError(
            f"{key_path}.finetune.method={tune.method!r} needs shared blocks: set "
            "model.share_encoder=True, or finetune.method to full, bitfit, attentive_probe or "
            "linear_probe."
        )
    if tune.method == "vpt_shallow" and (model.fusion != "early" or model.token_reduction_layers):
        raise UserError(
            f"{key_path}.finetune.method='vpt_shallow' needs model.fusion='early' and empty "
            "model.token_reduction_layers: set these, or finetune.method to 'vpt_deep'."
        )
    for name in ("temporal_alignment", "framewise", "synchronization"):
        if (
            name in objectives
            and model.token_reduction_layers
            and (name != "synchronization" or objectives[name].laid)
        ):
            raise UserError(
                f"{key_path}.objectives.{name} predicts for every particle: leave "
                "model.token_reduction_layers empty."
            )
    if "feature_distillation" in objectives and model.fusion in ("late", "bottleneck"):
        raise UserError(
            f"{key_path}.objectives.feature_distillation decodes one modality from another, which "
            f"fusion {model.fusion!r} does not support: set model.fusion to 'early' or 'cross'."
        )
    distil = objectives.get("feature_distillation")
    if distil and distil.modality == distil.teacher_modality:
        raise UserError(
            f"{key_path}.objectives.feature_distillation has modality and teacher_modality "
            f"{distil.teacher_modality!r}: use two different modalities."
        )
