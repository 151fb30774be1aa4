# SPDX-License-Identifier: Apache-2.0
"""What an experiment may say about the model and about the objectives that train it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config import training
from particlejax.config.fields import Spec, at_least, between, interval, one_of
from particlejax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class StemSpec(Spec):
    """A published 3D CNN between the pixels of each vision particle, which are a sub-clip, and its
    token.

    It trains like the rest; `finetune.freeze='payload_vision/network'` keeps it as it came. Its
    batch normalisation is by the statistics that the weights brought, in training too.
    """

    # c3d, i3d, i3d_r50, x3d_xs to x3d_l (models/variants.py); '': a Dense layer reads the pixels
    model: str = ""
    endpoint: str = ""  # feature map whose mean becomes the token; '': the network's last
    # of a stage that starts afresh: a file, or the --workdir of import_weights; '': a package's; or
    # 'random'
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class ModelSpec(Spec):
    """The encoder and, where an objective needs it, the decoder."""

    width: int = at_least(192, 1)
    depth: int = at_least(6, 1)
    num_heads: int = at_least(3, 1)
    distance_bias: bool = True  # attention falls with distance in time and space, learned per head
    mlp_ratio: int = at_least(4, 1)  # hidden width of the MLP, in widths
    rope: bool = False  # queries and keys turned by place (nn/rotary.py)
    qk_norm: bool = False  # queries and keys normed (arXiv:2302.05442)
    mlp_activation: str = one_of("gelu", "swiglu")  # of the MLP
    # that each branch starts with (arXiv:2103.17239); 0: none
    layer_scale: float = at_least(0.0, 0)
    # how modalities read each other (nn/fusion.py)
    fusion: str = one_of("early", "bottleneck", "late", "cross")
    # number of the block from which they do, in bottleneck and cross
    fusion_layer: int = at_least(0, 0)
    # per clip, that carry what crosses in bottleneck (arXiv:2107.00135)
    num_bottlenecks: int = at_least(4, 1)
    share_encoder: bool = True  # one stack of blocks for all modalities; else each has its own
    # probability that training hides a modality of a clip, never all
    modality_dropout: float = between(0.0, 0, 1)
    stem: StemSpec = StemSpec()  # what reads the pixels of vision
    dropout: float = between(0.0, 0, 1, open_at="most")
    drop_path_rate: float = between(
        0.0, 0, 1, open_at="most"
    )  # stochastic depth of the last block, linear from 0 (arXiv:1603.09382)
    # what becomes of tokens after the blocks `reduce_after` (nn/reduce.py)
    token_reduction: str = one_of("prune", "merge")
    # numbers of blocks, ascending; (): all tokens go through all blocks
    token_reduction_layers: tuple[int, ...] = at_least((), 1)
    token_keep_rate: float = between(
        0.5, 0, 1, open_at="least most"
    )  # share of a clip's tokens that stays each time
    # how a clip's tokens become the vector that is classified
    pool_type: str = one_of("mean", "attention", "cls")
    pool_num_heads: int = at_least(8, 1)  # of attention pooling
    embed_dim: int = at_least(128, 1)  # width of what clips are compared by
    decoder_width: int = at_least(128, 1)
    decoder_depth: int = at_least(2, 1)
    decoder_num_heads: int = at_least(2, 1)
    # auto: what the devices run best (nn/flash.py)
    attention_impl: str = one_of("auto", "xla", "splash", "cudnn")
    # layers unrolled in the program: faster, in less memory; slower to compile
    unroll_layers: bool = True
    # of the computation; parameters and reductions stay float32 (nn/policy.py)
    dtype: str = one_of("float32", "bfloat16")
    # what the backward pass computes again (nn/policy.py)
    remat_policy: str = one_of("none", "full", "dots_no_batch", "dots")

    def check(self) -> None:
        """Raises UserError where settings contradict each other."""
        if self.width % self.num_heads or self.decoder_width % self.decoder_num_heads:
            raise UserError(
                f"ModelSpec.width={self.width} and decoder_width={self.decoder_width} must be "
                f"multiples of heads={self.num_heads} and decoder_heads={self.decoder_num_heads}."
            )
        if self.pool_type == "attention" and self.width % self.pool_num_heads:
            raise UserError(
                f"ModelSpec.width={self.width} is not a multiple of "
                f"pool_heads={self.pool_num_heads}: "
                "change one."
            )
        edges = (0, *self.token_reduction_layers, self.depth)
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise UserError(
                f"ModelSpec.token_reduction_layers={self.token_reduction_layers} must name blocks "
                "between 1 and "
                f"{self.depth - 1}, "
                "ascending: correct it, or leave it empty."
            )
        if self.token_reduction_layers and (
            self.fusion != "early" or not self.share_encoder or self.pool_type == "cls"
        ):
            raise UserError(
                "ModelSpec.token_reduction_layers goes with fusion 'early', shared blocks and pool "
                "'mean' or "
                "'attention', as "
                "tokens lose their order: leave it empty, or choose those."
            )
        # what latents have read is read a block later
        last = self.depth - (2 if self.fusion == "bottleneck" else 1)
        if self.fusion_layer > last and self.fusion != "early":
            raise UserError(
                f"ModelSpec.fusion_layer={self.fusion_layer} is too late for {self.depth} blocks "
                "of "
                "fusion "
                f"{self.fusion!r}: use {last} or less."
            )
        least = 0.5 if self.token_reduction == "merge" else 0.0
        if not least <= self.token_keep_rate < 1 or not self.token_keep_rate:
            raise UserError(
                f"ModelSpec.token_keep_rate={self.token_keep_rate:g} must be below 1 and "
                + ("at least 0.5, as tokens merge in pairs." if least else "above 0.")
            )


@dataclasses.dataclass(frozen=True)
class MaskSpec(Spec):
    """What is hidden of a modality, and how much of that is asked for."""

    weight: float = at_least(1.0, 0)
    modality: str = "vision"
    # hidden more often is what changes most; what says least
    mask_type: str = one_of("tube", "random", "motion", "low_variance")
    mask_ratio: float = between(0.75, 0, 1)  # share of the particles that the encoder does not see
    target_ratio: float = between(0.5, 0, 1)  # share of the particles that are asked for


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoderSpec(MaskSpec):
    """Masked particle prediction: an encoder on the visible, a decoder that is asked for the
    hidden.
    """

    norm_pix_loss: bool = True  # targets normalised per particle (arXiv:2111.06377, section 4.1)


@dataclasses.dataclass(frozen=True)
class ClassifySpec(Spec):
    """What a clip is: one class (softmax), several at once, written 'a|b' (binary), or a number
    (regression).
    """

    weight: float = at_least(1.0, 0)
    loss: str = one_of("softmax", "sigmoid", "regression")
    label_smoothing: float = between(0.0, 0, 1, open_at="most")
    # gamma of the focal loss: what is known already counts less (arXiv:1708.02002); 0: alike
    focal_gamma: float = at_least(0.0, 0)
    # beta of class-balanced weights, such as 0.999 (arXiv:1901.05555); 0: alike
    class_balance_beta: float = between(0.0, 0, 0.9999999)
    # weight of R-Drop: two draws of dropout shall agree (arXiv:2106.14448); 0: one draw
    rdrop_weight: float = at_least(0.0, 0)


@dataclasses.dataclass(frozen=True)
class JepaSpec(MaskSpec):
    """Masked prediction of a teacher's features; the teacher is the stage's average, so `ema` is
    above 0.
    """


@dataclasses.dataclass(frozen=True)
class FeatureDistillationSpec(Spec):
    """What a published network says of sub-clips (job extract_features), predicted from what the
    encoder sees of `modality`.
    """

    weight: float = at_least(1.0, 0)
    modality: str = "vision"
    # modality that holds the answers; the encoder never sees it
    teacher_modality: str = "video_features"
    # hidden more often is what changes most; what says least
    mask_type: str = one_of("random", "tube", "motion", "low_variance")
    # share of the particles that the encoder does not see
    mask_ratio: float = between(0.5, 0, 0.99)
    # smooth L1, as masked video distillation has it, or the angle
    loss: str = one_of("smooth_l1", "cosine")


@dataclasses.dataclass(frozen=True)
class FuturePredictionSpec(Spec):
    """Prediction of the particles of later moments from what ended before."""

    weight: float = at_least(1.0, 0)
    modality: str = "vision"
    # shares of the clip that the present is drawn between
    split_range: tuple[float, float] = interval((0.25, 0.75), 0, 1)
    horizon: float = at_least(0.0, 0)  # seconds ahead; 0: to the end of the clip
    # payloads, each normalised or as it is; or against the last known frame
    target: str = one_of("norm_pix", "pixels", "residual")


@dataclasses.dataclass(frozen=True)
class ClipOrderSpec(Spec):
    """Which of six orders a clip's thirds stand in."""

    weight: float = at_least(1.0, 0)


@dataclasses.dataclass(frozen=True)
class PlaybackSpeedSpec(Spec):
    """How often a clip's speed was doubled. Clips want at least 2 ** doublings particles one after
    the other.
    """

    weight: float = at_least(1.0, 0)
    max_doublings: int = between(1, 1, 4)  # at most


@dataclasses.dataclass(frozen=True)
class ArrowOfTimeSpec(Spec):
    """Whether a clip runs forward or backward."""

    weight: float = at_least(1.0, 0)


@dataclasses.dataclass(frozen=True)
class RotationFlipSpec(Spec):
    """Which of eight turns and mirrorings a clip went through."""

    weight: float = at_least(1.0, 0)


@dataclasses.dataclass(frozen=True)
class SynchronizationSpec(Spec):
    """By how much a second modality is shifted against a first, or whether it is another clip's."""

    weight: float = at_least(1.0, 0)
    # the second is shifted; one named twice: the picture's right half against its left
    modalities: tuple[str, str] = ("vision", "audio")
    max_shift: int = at_least(2, 1)  # steps to either side: 2 * shifts + 1 answers
    shift_stride: int = at_least(2, 1)  # of the second's particles that make a step
    # asked of who reads both; or where they vary alike, each read by itself
    method: str = one_of("joint", "correlation")
    # share of rows with the second of another clip; 0: none
    mismatch_prob: float = between(0.2, 0, 1)

    @property
    def laid(self) -> tuple[str, ...]:
        """Modalities whose moments are laid over each other."""
        return self.modalities if self.method == "correlation" else ()


@dataclasses.dataclass(frozen=True)
class ContrastiveSpec(Spec):
    """Clips told from each other by embeddings of two modalities, or of two masked views of one
    named twice.
    """

    weight: float = at_least(1.0, 0)
    modalities: tuple[str, str] = ("vision", "text")
    loss: str = one_of("infonce", "sigmoid")
    mask_ratio: float = between(0.5, 0, 1)  # share of the particles that each of two views lacks


@dataclasses.dataclass(frozen=True)
class TextMatchingSpec(Spec):
    """Whether a text belongs to the clip or to another one of the batch."""

    weight: float = at_least(1.0, 0)
    modality: str = "text"
    mismatch_prob: float = between(0.5, 0, 1)  # share of clips that are shown the text of another
    # whose: the next row's, or drawn by how alike the encoder finds the clips
    negatives: str = one_of("shifted", "hard")


@dataclasses.dataclass(frozen=True)
class TemporalAlignmentSpec(Spec):
    """When in its clip each particle of a modality is, given the others; its own time is hidden."""

    weight: float = at_least(1.0, 0)
    modality: str = "text"
    num_bins: int = at_least(8, 2)  # of the clip's time, equal ones, that are told apart


@dataclasses.dataclass(frozen=True)
class MaskedLmSpec(Spec):
    """Masked language modelling given the rest of the clip."""

    weight: float = at_least(1.0, 0)
    modality: str = "text"
    # share of the words that the encoder does not see and is asked for
    mask_ratio: float = between(0.3, 0, 1)


@dataclasses.dataclass(frozen=True)
class MaskedVisualTokensSpec(MaskSpec):
    """Masked prediction of clusters: k-means over payloads, found before the first step, makes
    words of a modality of numbers.
    """

    codebook_size: int = at_least(256, 2)  # clusters
    kmeans_samples: int = at_least(16384, 2)  # particles that they are found among


@dataclasses.dataclass(frozen=True)
class FramewiseSpec(Spec):
    """The channels of a series, or the spectrum of a sound, at each moment, told from what the clip
    holds besides them.
    """

    weight: float = at_least(1.0, 0)
    modality: str = one_of("timeseries", "audio")
    # binary: channels of 0 and 1, such as whether a moment belongs to the summary
    loss: str = one_of("mse", "sigmoid")


# Random keys and the sum of the losses follow this order, which a new objective must not
# change: it goes to the end.
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
    objectives: Mapping[str, Any], tune: training.FinetuneSpec, model: ModelSpec, where: str
) -> None:
    """Raises UserError where what a stage learns, or which parameters it trains, contradicts the
    model.
    """
    training.check(tune, model.pool_type, where)
    if (
        tune.method in ("lora", "ia3", "adapter", "prefix", "vpt_shallow", "vpt_deep")
        and not model.share_encoder
    ):
        raise UserError(
            f"{where}.finetune.method={tune.method!r} changes blocks that all modalities share: "
            "set "
            "model.share_encoder=True, or "
            "finetune.method to full, bitfit, probe or linear."
        )
    if tune.method == "vpt_shallow" and (model.fusion != "early" or model.token_reduction_layers):
        raise UserError(
            f"{where}.finetune.method is 'prompt', whose tokens go through all blocks with a "
            "clip's own: "
            "set model.fusion to "
            "'early' and leave model.token_reduction_layers empty, or finetune.method to "
            "'prompt_deep'."
        )
    for name in ("temporal_alignment", "framewise", "synchronization"):
        if (
            name in objectives
            and model.token_reduction_layers
            and (name != "synchronization" or objectives[name].laid)
        ):
            raise UserError(
                f"{where}.objectives.{name} asks about every particle: leave "
                "model.token_reduction_layers "
                "empty."
            )
    if "feature_distillation" in objectives and model.fusion in ("late", "bottleneck"):
        raise UserError(
            f"{where}.objectives.feature_distillation asks for a modality that the encoder does "
            "not see, and the "
            "decoder of fusion "
            f"{model.fusion!r} reads that alone: set model.fusion to 'early' or 'cross'."
        )
    distil = objectives.get("feature_distillation")
    if distil and distil.modality == distil.teacher_modality:
        raise UserError(
            f"{where}.objectives.feature_distillation would hide {distil.teacher_modality!r} from "
            "an encoder that is to "
            "see it: name another "
            "modality."
        )
