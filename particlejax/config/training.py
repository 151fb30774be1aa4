# SPDX-License-Identifier: Apache-2.0
"""What a stage may say about fine-tuning: which parameters train, and what makes the step more
robust than a plain gradient.
"""

import dataclasses

from particlejax.config.fields import Spec, at_least, between, one_of
from particlejax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class FinetuneSpec(Spec):
    """Which parameters train. What stands outside the encoder (head, pool, decoder) always does.

    linear: that alone. probe: that, with attention pooling. bitfit: and the encoder's biases
    (arXiv:2106.10199). lora (arXiv:2106.09685), ia3 (arXiv:2205.05638), adapter (arXiv:1902.00751),
    prefix (arXiv:2101.00190), prompt (tokens at the input, VPT-shallow of arXiv:2203.12119),
    prompt_deep (at every block's, VPT-deep): and new parameters.
    """

    method: str = one_of(
        "full",
        "linear_probe",
        "attentive_probe",
        "bitfit",
        "lora",
        "adapter",
        "prefix",
        "ia3",
        "vpt_shallow",
        "vpt_deep",
    )
    # regular expression of paths that train as well, such as 'norm/' or 'encoder/modality'; '':
    # none
    extra_trainable: str = ""
    # regular expression of paths that do not train whatever `how` says, such as
    # 'payload_vision/network'
    freeze: str = ""
    lora_rank: int = at_least(8, 1)  # of lora
    lora_alpha: float = at_least(16.0, 0)  # of lora: its product counts alpha / rank
    # regular expression of the encoder's kernels that lora changes
    target_modules: str = r"attention/(query|value)/kernel$"
    adapter_dim: int = at_least(16, 1)  # hidden width of an adapter
    num_virtual_tokens: int = at_least(16, 1)  # of prefix, vpt_shallow and vpt_deep
    # learning rate of a block over that of the next one above (arXiv:2106.08254)
    layer_decay: float = between(1.0, 0.01, 1)
    # share of the steps in which blocks begin to train, from the top (arXiv:1801.06146)
    gradual_unfreeze_fraction: float = between(0.0, 0, 1)


def check(tune: FinetuneSpec, pool: str, where: str) -> None:
    """Raises UserError where a frozen part would stay as random as it was born."""
    if tune.method == "attentive_probe" and pool != "attention":
        raise UserError(
            f"{where}.finetune.method is 'probe' and the model's pool is {pool!r}: set "
            "config.model.pool_type "
            "to 'attention', or "
            "finetune.method to 'linear'."
        )
    if tune.method == "linear_probe" and pool != "mean":
        raise UserError(
            f"{where}.finetune.method is 'linear' and the model's pool is {pool!r}: set "
            "config.model.pool_type "
            "to 'mean', or "
            "finetune.method to 'probe'."
        )


@dataclasses.dataclass(frozen=True)
class RobustSpec(Spec):
    """Gradients that are taken where the loss is worse than here. Payloads are in the units that
    the model reads.
    """

    # distance in the trained parameters (SAM, arXiv:2010.01412), doubles a step's cost; 0: none
    sam_rho: float = at_least(0.0, 0)
    # on payloads: arXiv:2001.03994, 1706.06083, 1909.11764
    attack: str = one_of("none", "fgsm", "pgd", "free")
    epsilon: float = at_least(0.05, 0)  # most that each number of a payload is moved by
    # of pgd, which costs as many gradients more; of free, which costs as many in all
    attack_steps: int = at_least(3, 1)


@dataclasses.dataclass(frozen=True)
class ModelSoupSpec(Spec):
    """Job model_soup: runs of one architecture become one model, or one answer."""

    # of parameters (arXiv:2203.05482), of those that help, of probabilities
    method: str = one_of("uniform", "greedy", "ensemble")
    last_k_checkpoints: int = at_least(
        1,
        1,
        # checkpoints of each run that count, of those that config.checkpoint.max_to_keep left
        # (arXiv:1803.05407)
    )


@dataclasses.dataclass(frozen=True)
class ActiveLearningSpec(Spec):
    """Job active_learning: which clips without a label are worth one."""

    # least sure; nearest tie; far from all known (arXiv:1708.00489)
    strategy: str = one_of("entropy", "margin", "coreset", "random")
    num_clips: int = at_least(20, 1)  # clips of a round


@dataclasses.dataclass(frozen=True)
class PseudoLabelSpec(Spec):
    """Clips without a label learn from what is said of them when they are seen whole (FixMatch,
    arXiv:2001.07685).

    teacher 'average' is a mean teacher (arXiv:1703.01780); with target 'soft' and threshold 0,
    exactly that paper's loss.
    """

    weight: float = at_least(1.0, 0)
    # who says it: the parameters of the moment, or their moving average (stage.ema)
    teacher: str = one_of("self", "ema")
    # the likeliest class, by cross-entropy; all probabilities, by squared error
    target: str = one_of("hard", "soft")
    # clips whose likeliest class is less likely are not learnt from
    threshold: float = between(0.95, 0, 1)
    # share of the particles that the learner does not see
    mask_ratio: float = between(0.5, 0, 0.99)
    noise_std: float = at_least(0.2, 0)  # deviation of what is added to each number of its payloads
