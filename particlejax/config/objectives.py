# SPDX-License-Identifier: Apache-2.0
"""The training losses: one spec per objective, and the table OBJECTIVES of them all."""

import dataclasses

from particlejax.config.fields import Spec, at_least, between, interval, one_of


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
    # weights of the classes by their number of clips n: 0: equal; 1: 1 / n; between, such as 0.999:
    # (1 - beta) / (1 - beta^n) (arXiv:1901.05555); with softmax
    class_balance_beta: float = between(0.0, 0, 1)
    # weight of R-Drop, the KL divergence of two dropout samples (arXiv:2106.14448); 0: none
    rdrop_weight: float = at_least(0.0, 0)
    # weight of a clip that has a class against one that has not, with sigmoid; 0: for each class,
    # the number of training clips without it over those with it
    pos_weight: float = at_least(1.0, 0)


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
    def correlated_modalities(self) -> tuple[str, ...]:
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


@dataclasses.dataclass(frozen=True)
class PseudoLabelSpec(Spec):
    """Pseudo-labels: unlabeled clips train on predictions from the unmasked clip (FixMatch,
    arXiv:2001.07685).

    teacher 'ema' is a mean teacher (arXiv:1703.01780); with target 'soft' and threshold 0, the loss
    is that paper's.
    """

    weight: float = at_least(1.0, 0)  # weight of this loss
    # teacher: the current parameters, or their moving average (stage's ema_decay)
    teacher: str = one_of("self", "ema")
    # hard: most likely class, cross-entropy; soft: all probabilities, squared error
    target: str = one_of("hard", "soft")
    threshold: float = between(0.95, 0, 1)  # minimum confidence; less confident clips are ignored
    mask_ratio: float = between(0.5, 0, 0.99)  # fraction of particles masked for the student
    # standard deviation of the noise added to the student's payloads
    noise_std: float = at_least(0.2, 0)


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
    "pseudo_label": PseudoLabelSpec,
    "playback_speed": PlaybackSpeedSpec,
    "synchronization": SynchronizationSpec,
    "framewise": FramewiseSpec,
    "rotation_flip": RotationFlipSpec,
    "masked_visual_tokens": MaskedVisualTokensSpec,
    "masked_lm": MaskedLmSpec,
}
