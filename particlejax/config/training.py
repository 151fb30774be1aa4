# SPDX-License-Identifier: Apache-2.0
"""What a stage may say about fine-tuning: which parameters train, and what makes the step more
robust than a plain gradient.
"""

import dataclasses

from particlejax.config.fields import Spec, at_least, between, one_of
from particlejax.core.typing import UserError


@dataclasses.dataclass(frozen=True)
class TuneSpec(Spec):
    """Which parameters train. What stands outside the encoder (head, pool, decoder) always does.

    linear: that alone. probe: that, with attention pooling. bitfit: and the encoder's biases
    (arXiv:2106.10199). lora (arXiv:2106.09685), ia3 (arXiv:2205.05638), adapter (arXiv:1902.00751),
    prefix (arXiv:2101.00190), prompt (tokens at the input, VPT-shallow of arXiv:2203.12119),
    prompt_deep (at every block's, VPT-deep): and new parameters.
    """

    how: str = one_of(
        "full",
        "linear",
        "probe",
        "bitfit",
        "lora",
        "adapter",
        "prefix",
        "ia3",
        "prompt",
        "prompt_deep",
    )
    # regular expression of paths that train as well, such as 'norm/' or 'encoder/modality'; '':
    # none
    also: str = ""
    # regular expression of paths that do not train whatever `how` says, such as
    # 'payload_vision/network'
    freeze: str = ""
    rank: int = at_least(8, 1)  # of lora
    alpha: float = at_least(16.0, 0)  # of lora: its product counts alpha / rank
    # regular expression of the encoder's kernels that lora changes
    targets: str = r"attention/(query|value)/kernel$"
    size: int = at_least(16, 1)  # hidden width of an adapter; number of prefix vectors or prompts
    # learning rate of a block over that of the next one above (arXiv:2106.08254)
    layer_decay: float = between(1.0, 0.01, 1)
    # share of the steps in which blocks begin to train, from the top (arXiv:1801.06146)
    unfreeze: float = between(0.0, 0, 1)


def check(tune: TuneSpec, pool: str, where: str) -> None:
    """Raises UserError where a frozen part would stay as random as it was born."""
    if tune.how == "probe" and pool != "attention":
        raise UserError(
            f"{where}.tune.how is 'probe' and the model's pool is {pool!r}: set config.model.pool "
            "to 'attention', or "
            "tune.how to 'linear'."
        )
    if tune.how == "linear" and pool != "mean":
        raise UserError(
            f"{where}.tune.how is 'linear' and the model's pool is {pool!r}: set config.model.pool "
            "to 'mean', or "
            "tune.how to 'probe'."
        )


@dataclasses.dataclass(frozen=True)
class RobustSpec(Spec):
    """Gradients that are taken where the loss is worse than here. Payloads are in the units that
    the model reads.
    """

    # distance in the trained parameters (SAM, arXiv:2010.01412), doubles a step's cost; 0: none
    sam: float = at_least(0.0, 0)
    # on payloads: arXiv:2001.03994, 1706.06083, 1909.11764
    attack: str = one_of("none", "fgsm", "pgd", "free")
    epsilon: float = at_least(0.05, 0)  # most that each number of a payload is moved by
    # of pgd, which costs as many gradients more; of free, which costs as many in all
    ascents: int = at_least(3, 1)


@dataclasses.dataclass(frozen=True)
class SoupSpec(Spec):
    """Job soup: runs of one architecture become one model, or one answer."""

    # of parameters (arXiv:2203.05482), of those that help, of probabilities
    how: str = one_of("average", "greedy", "ensemble")
    newest: int = at_least(
        1,
        1,
        # checkpoints of each run that count, of those that config.checkpoint.keep left
        # (arXiv:1803.05407)
    )


@dataclasses.dataclass(frozen=True)
class ActiveSpec(Spec):
    """Job label_next: which clips without a label are worth one."""

    # least sure; nearest tie; far from all known (arXiv:1708.00489)
    how: str = one_of("entropy", "margin", "coreset", "random")
    number: int = at_least(20, 1)  # clips of a round


@dataclasses.dataclass(frozen=True)
class PseudoSpec(Spec):
    """Clips without a label learn from what is said of them when they are seen whole (FixMatch,
    arXiv:2001.07685).

    teacher 'average' is a mean teacher (arXiv:1703.01780); with target 'soft' and threshold 0,
    exactly that paper's loss.
    """

    weight: float = at_least(1.0, 0)
    # who says it: the parameters of the moment, or their moving average (stage.ema)
    teacher: str = one_of("self", "average")
    # the likeliest class, by cross-entropy; all probabilities, by squared error
    target: str = one_of("label", "soft")
    # clips whose likeliest class is less likely are not learnt from
    threshold: float = between(0.95, 0, 1)
    keep: float = between(0.5, 0.01, 1)  # share of the particles that the learner sees
    noise: float = at_least(0.2, 0)  # deviation of what is added to each number of its payloads
