# SPDX-License-Identifier: Apache-2.0
"""What an experiment may say about the model and about the objectives that train it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config import training
from particlejax.config.fields import Spec, at_least, between, interval, one_of
from particlejax.core.typing import UserError


@dataclasses.dataclass(frozen=True)
class StemSpec(Spec):
    """A published 3D CNN between the pixels of each vision particle, which are a sub-clip, and its
    token.

    It trains like the rest; `tune.freeze='payload_vision/network'` keeps it as it came. Its batch
    normalisation is by the statistics that the weights brought, in training too.
    """

    # c3d, i3d, i3d_r50, x3d_xs to x3d_l (models/variants.py); '': a Dense layer reads the pixels
    network: str = ""
    endpoint: str = ""  # feature map whose mean becomes the token; '': the network's last
    # of a stage that starts afresh: a file, or the --workdir of import_weights; '': a package's; or
    # 'random'
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class ModelSpec(Spec):
    """The encoder and, where an objective needs it, the decoder."""

    width: int = at_least(192, 1)
    depth: int = at_least(6, 1)
    heads: int = at_least(3, 1)
    near: bool = True  # attention falls with distance in time and space, learned per head
    mlp: int = at_least(4, 1)  # hidden width of the MLP, in widths
    rotary: bool = False  # queries and keys turned by place (nn/rotary.py)
    qk_norm: bool = False  # queries and keys normed (arXiv:2302.05442)
    gate: str = one_of("gelu", "swiglu")  # of the MLP
    # that each branch starts with (arXiv:2103.17239); 0: none
    layer_scale: float = at_least(0.0, 0)
    # how modalities read each other (nn/fusion.py)
    fusion: str = one_of("early", "bottleneck", "late", "cross")
    # number of the block from which they do, in bottleneck and cross
    fuse_from: int = at_least(0, 0)
    # per clip, that carry what crosses in bottleneck (arXiv:2107.00135)
    latents: int = at_least(4, 1)
    separate: bool = False  # blocks of their own for each modality
    # probability that training hides a modality of a clip, never all
    modality_dropout: float = between(0.0, 0, 1)
    stem: StemSpec = StemSpec()  # what reads the pixels of vision
    dropout: float = between(0.0, 0, 1, open_at="most")
    drop_path: float = between(
        0.0, 0, 1, open_at="most"
    )  # stochastic depth of the last block, linear from 0 (arXiv:1603.09382)
    # what becomes of tokens after the blocks `reduce_after` (nn/reduce.py)
    reduce: str = one_of("drop", "merge")
    # numbers of blocks, ascending; (): all tokens go through all blocks
    reduce_after: tuple[int, ...] = at_least((), 1)
    reduce_keep: float = between(
        0.5, 0, 1, open_at="least most"
    )  # share of a clip's tokens that stays each time
    # how a clip's tokens become the vector that is classified
    pool: str = one_of("mean", "attention", "token")
    pool_heads: int = at_least(8, 1)  # of attention pooling
    embedding: int = at_least(128, 1)  # width of what clips are compared by
    decoder_width: int = at_least(128, 1)
    decoder_depth: int = at_least(2, 1)
    decoder_heads: int = at_least(2, 1)
    # auto: what the devices run best (nn/flash.py)
    attention: str = one_of("auto", "plain", "splash", "cudnn")
    unroll: bool = True  # layers unrolled in the program: faster, in less memory; slower to compile
    # of the computation; parameters and reductions stay float32 (nn/policy.py)
    dtype: str = one_of("float32", "bfloat16")
    # what the backward pass computes again (nn/policy.py)
    remat: str = one_of("none", "blocks", "attention", "elementwise")

    def check(self) -> None:
        """Raises UserError where settings contradict each other."""
        if self.width % self.heads or self.decoder_width % self.decoder_heads:
            raise UserError(
                f"ModelSpec.width={self.width} and decoder_width={self.decoder_width} must be "
                f"multiples of heads={self.heads} and decoder_heads={self.decoder_heads}."
            )
        if self.pool == "attention" and self.width % self.pool_heads:
            raise UserError(
                f"ModelSpec.width={self.width} is not a multiple of pool_heads={self.pool_heads}: "
                "change one."
            )
        edges = (0, *self.reduce_after, self.depth)
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise UserError(
                f"ModelSpec.reduce_after={self.reduce_after} must name blocks between 1 and "
                f"{self.depth - 1}, "
                "ascending: correct it, or leave it empty."
            )
        if self.reduce_after and (self.fusion != "early" or self.separate or self.pool == "token"):
            raise UserError(
                "ModelSpec.reduce_after goes with fusion 'early', shared blocks and pool 'mean' or "
                "'attention', as "
                "tokens lose their order: leave it empty, or choose those."
            )
        # what latents have read is read a block later
        last = self.depth - (2 if self.fusion == "bottleneck" else 1)
        if self.fuse_from > last and self.fusion != "early":
            raise UserError(
                f"ModelSpec.fuse_from={self.fuse_from} is too late for {self.depth} blocks of "
                "fusion "
                f"{self.fusion!r}: use {last} or less."
            )
        least = 0.5 if self.reduce == "merge" else 0.0
        if not least <= self.reduce_keep < 1 or not self.reduce_keep:
            raise UserError(
                f"ModelSpec.reduce_keep={self.reduce_keep:g} must be below 1 and "
                + ("at least 0.5, as tokens merge in pairs." if least else "above 0.")
            )


@dataclasses.dataclass(frozen=True)
class HiddenSpec(Spec):
    """What is hidden of a modality, and how much of that is asked for."""

    weight: float = at_least(1.0, 0)
    modality: str = "vision"
    # hidden more often is what changes most; what says least
    mask: str = one_of("tube", "random", "motion", "adaptive")
    keep: float = between(0.25, 0, 1)  # share of the particles that the encoder sees
    predict: float = between(0.5, 0, 1)  # share of the particles that are asked for


@dataclasses.dataclass(frozen=True)
class MaskedSpec(HiddenSpec):
    """Masked particle prediction: an encoder on the visible, a decoder that is asked for the
    hidden.
    """

    normalise: bool = True  # targets normalised per particle (arXiv:2111.06377, section 4.1)


@dataclasses.dataclass(frozen=True)
class ClassifySpec(Spec):
    """What a clip is: one class (softmax), several at once, written 'a|b' (binary), or a number
    (regression).
    """

    weight: float = at_least(1.0, 0)
    loss: str = one_of("softmax", "binary", "regression")
    label_smoothing: float = between(0.0, 0, 1, open_at="most")
    # gamma of the focal loss: what is known already counts less (arXiv:1708.02002); 0: alike
    focus: float = at_least(0.0, 0)
    # beta of class-balanced weights, such as 0.999 (arXiv:1901.05555); 0: alike
    balance: float = between(0.0, 0, 0.9999999)
    # weight of R-Drop: two draws of dropout shall agree (arXiv:2106.14448); 0: one draw
    consistency: float = at_least(0.0, 0)


@dataclasses.dataclass(frozen=True)
class LatentSpec(HiddenSpec):
    """Masked prediction of a teacher's features; the teacher is the stage's average, so `ema` is
    above 0.
    """


@dataclasses.dataclass(frozen=True)
class DistilSpec(Spec):
    """What a published network says of sub-clips (job features), predicted from what the encoder
    sees of `modality`.
    """

    weight: float = at_least(1.0, 0)
    modality: str = "vision"
    teacher: str = "features"  # modality that holds the answers; the encoder never sees it
    # hidden more often is what changes most; what says least
    mask: str = one_of("random", "tube", "motion", "adaptive")
    keep: float = between(0.5, 0.01, 1)  # share of the particles that the encoder sees
    # smooth L1, as masked video distillation has it, or the angle
    loss: str = one_of("smooth", "cosine")


@dataclasses.dataclass(frozen=True)
class NextFrameSpec(Spec):
    """Prediction of the particles of later moments from what ended before."""

    weight: float = at_least(1.0, 0)
    modality: str = "vision"
    # shares of the clip that the present is drawn between
    moment: tuple[float, float] = interval((0.25, 0.75), 0, 1)
    horizon: float = at_least(0.0, 0)  # seconds ahead; 0: to the end of the clip
    # payloads, each normalised or as it is; or against the last known frame
    target: str = one_of("normalised", "plain", "change")


@dataclasses.dataclass(frozen=True)
class OrderSpec(Spec):
    """Which of six orders a clip's thirds stand in."""

    weight: float = at_least(1.0, 0)


@dataclasses.dataclass(frozen=True)
class SpeedSpec(Spec):
    """How often a clip's speed was doubled. Clips want at least 2 ** doublings particles one after
    the other.
    """

    weight: float = at_least(1.0, 0)
    doublings: int = between(1, 1, 4)  # at most


@dataclasses.dataclass(frozen=True)
class ArrowSpec(Spec):
    """Whether a clip runs forward or backward."""

    weight: float = at_least(1.0, 0)


@dataclasses.dataclass(frozen=True)
class TransformSpec(Spec):
    """Which of eight turns and mirrorings a clip went through."""

    weight: float = at_least(1.0, 0)


@dataclasses.dataclass(frozen=True)
class SyncSpec(Spec):
    """By how much a second modality is shifted against a first, or whether it is another clip's."""

    weight: float = at_least(1.0, 0)
    # the second is shifted; one named twice: the picture's right half against its left
    pair: tuple[str, str] = ("vision", "audio")
    shifts: int = at_least(2, 1)  # steps to either side: 2 * shifts + 1 answers
    step: int = at_least(2, 1)  # of the second's particles that make a step
    # asked of who reads both; or where they vary alike, each read by itself
    how: str = one_of("question", "correlation")
    other: float = between(0.2, 0, 1)  # share of rows with the second of another clip; 0: none

    @property
    def laid(self) -> tuple[str, ...]:
        """Modalities whose moments are laid over each other."""
        return self.pair if self.how == "correlation" else ()


@dataclasses.dataclass(frozen=True)
class ContrastSpec(Spec):
    """Clips told from each other by embeddings of two modalities, or of two masked views of one
    named twice.
    """

    weight: float = at_least(1.0, 0)
    pair: tuple[str, str] = ("vision", "text")
    loss: str = one_of("infonce", "sigmoid")
    keep: float = between(0.5, 0, 1)  # share of the particles in each of two views


@dataclasses.dataclass(frozen=True)
class MatchSpec(Spec):
    """Whether a text belongs to the clip or to another one of the batch."""

    weight: float = at_least(1.0, 0)
    modality: str = "text"
    other: float = between(0.5, 0, 1)  # share of clips that are shown the text of another
    # whose: the next row's, or drawn by how alike the encoder finds the clips
    negatives: str = one_of("next", "hard")


@dataclasses.dataclass(frozen=True)
class AlignSpec(Spec):
    """When in its clip each particle of a modality is, given the others; its own time is hidden."""

    weight: float = at_least(1.0, 0)
    modality: str = "text"
    bins: int = at_least(8, 2)  # of the clip's time, equal ones, that are told apart


@dataclasses.dataclass(frozen=True)
class WordsSpec(Spec):
    """Masked language modelling given the rest of the clip."""

    weight: float = at_least(1.0, 0)
    modality: str = "text"
    # share of the words that the encoder sees; the others are asked for
    keep: float = between(0.7, 0, 1)


@dataclasses.dataclass(frozen=True)
class VisualWordsSpec(HiddenSpec):
    """Masked prediction of clusters: k-means over payloads, found before the first step, makes
    words of a modality of numbers.
    """

    codes: int = at_least(256, 2)  # clusters
    examples: int = at_least(16384, 2)  # particles that they are found among


@dataclasses.dataclass(frozen=True)
class TraceSpec(Spec):
    """The channels of a series, or the spectrum of a sound, at each moment, told from what the clip
    holds besides them.
    """

    weight: float = at_least(1.0, 0)
    modality: str = one_of("series", "audio")
    # binary: channels of 0 and 1, such as whether a moment belongs to the summary
    loss: str = one_of("squared", "binary")


OBJECTIVES = {
    "masked": MaskedSpec,
    "latent": LatentSpec,
    "distil": DistilSpec,
    "next_frame": NextFrameSpec,
    "order": OrderSpec,
    "speed": SpeedSpec,
    "arrow": ArrowSpec,
    "transform": TransformSpec,
    "sync": SyncSpec,
    "contrast": ContrastSpec,
    "match": MatchSpec,
    "words": WordsSpec,
    "visual_words": VisualWordsSpec,
    "align": AlignSpec,
    "trace": TraceSpec,
    "classify": ClassifySpec,
    "pseudo": training.PseudoSpec,
}


def check_stage(
    objectives: Mapping[str, Any], tune: training.TuneSpec, model: ModelSpec, where: str
) -> None:
    """Raises UserError where what a stage learns, or which parameters it trains, contradicts the
    model.
    """
    training.check(tune, model.pool, where)
    if tune.how in ("lora", "ia3", "adapter", "prefix", "prompt", "prompt_deep") and model.separate:
        raise UserError(
            f"{where}.tune.how={tune.how!r} changes blocks that all modalities share: set "
            "model.separate=False, or "
            "tune.how to full, bitfit, probe or linear."
        )
    if tune.how == "prompt" and (model.fusion != "early" or model.reduce_after):
        raise UserError(
            f"{where}.tune.how is 'prompt', whose tokens go through all blocks with a clip's own: "
            "set model.fusion to "
            "'early' and leave model.reduce_after empty, or tune.how to 'prompt_deep'."
        )
    for name in ("align", "trace", "sync"):
        if name in objectives and model.reduce_after and (name != "sync" or objectives[name].laid):
            raise UserError(
                f"{where}.objectives.{name} asks about every particle: leave model.reduce_after "
                "empty."
            )
    if "distil" in objectives and model.fusion in ("late", "bottleneck"):
        raise UserError(
            f"{where}.objectives.distil asks for a modality that the encoder does not see, and the "
            "decoder of fusion "
            f"{model.fusion!r} reads that alone: set model.fusion to 'early' or 'cross'."
        )
    distil = objectives.get("distil")
    if distil and distil.modality == distil.teacher:
        raise UserError(
            f"{where}.objectives.distil would hide {distil.teacher!r} from an encoder that is to "
            "see it: name another "
            "modality."
        )
