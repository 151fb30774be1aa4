# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning and robustness settings of a stage, and settings of related jobs."""

import dataclasses

from particlejax.config.fields import Spec, at_least, between, one_of
from particlejax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class FinetuneSpec(Spec):
    """The parameters to train. All parameters outside the encoder (head, pool, decoder) always
    train.

    linear_probe: only these. attentive_probe: these, with attention pooling. bitfit: also the
    encoder's biases (arXiv:2106.10199). lora (arXiv:2106.09685), ia3 (arXiv:2205.05638), adapter
    (arXiv:1902.00751), prefix (arXiv:2101.00190), vpt_shallow (prompt tokens at the input,
    arXiv:2203.12119), vpt_deep (at every block): also new parameters.
    """

    # fine-tuning method, as listed above
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
    # regular expression of further parameter paths to train, such as 'norm/' or 'encoder/modality';
    # '': none
    extra_trainable: str = ""
    # regular expression of parameter paths to freeze for any `method`, such as
    # 'payload_vision/network'; '': none
    freeze: str = ""
    lora_rank: int = at_least(8, 1)  # rank of LoRA matrices
    # LoRA scale: the update is multiplied by lora_alpha / lora_rank
    lora_alpha: float = at_least(16.0, 0)
    # regular expression of the encoder kernels that LoRA adapts
    target_modules: str = r"attention/(query|value)/kernel$"
    adapter_dim: int = at_least(16, 1)  # hidden width of adapters
    # number of tokens of prefix, vpt_shallow and vpt_deep
    num_virtual_tokens: int = at_least(16, 1)
    # learning-rate ratio of each block to the next higher one (arXiv:2106.08254)
    layer_decay: float = between(1.0, 0.01, 1)
    # fraction of the steps in which blocks unfreeze, from the top (arXiv:1801.06146)
    gradual_unfreeze_fraction: float = between(0.0, 0, 1)


def check_finetune(tune: FinetuneSpec, pool: str, key_path: str) -> None:
    """Raises UserError if the frozen part would stay randomly initialized."""
    if tune.method == "attentive_probe" and pool != "attention":
        raise UserError(
            f"{key_path}.finetune.method='attentive_probe' needs attention pooling, but "
            f"model.pool_type is {pool!r}: set it to 'attention', or finetune.method to "
            "'linear_probe'."
        )
    if tune.method == "linear_probe" and pool != "mean":
        raise UserError(
            f"{key_path}.finetune.method='linear_probe' needs mean pooling, but model.pool_type is "
            f"{pool!r}: set it to 'mean', or finetune.method to 'attentive_probe'."
        )


@dataclasses.dataclass(frozen=True)
class RobustSpec(Spec):
    """Adversarial training and sharpness-aware minimization. Payloads are in the model's normalized
    units.
    """

    # radius of SAM in parameter space (arXiv:2010.01412), which doubles the cost of a step; 0: none
    sam_rho: float = at_least(0.0, 0)
    # adversarial attack on payloads (arXiv:2001.03994, 1706.06083, 1909.11764)
    attack: str = one_of("none", "fgsm", "pgd", "free")
    epsilon: float = at_least(0.05, 0)  # maximum change of each payload value
    # gradient steps of the attack: pgd adds this many gradients, free uses this many in all
    attack_steps: int = at_least(3, 1)


@dataclasses.dataclass(frozen=True)
class ModelSoupSpec(Spec):
    """Job model_soup: combine runs of one architecture into one model or one ensemble."""

    # average of parameters (arXiv:2203.05482), greedy average, or average of probabilities
    method: str = one_of("uniform", "greedy", "ensemble")
    # newest checkpoints per run to average, of the config.checkpoint.max_to_keep kept ones
    # (arXiv:1803.05407)
    last_k_checkpoints: int = at_least(1, 1)


@dataclasses.dataclass(frozen=True)
class ActiveLearningSpec(Spec):
    """Job active_learning: select unlabeled clips to label."""

    # highest entropy, smallest margin, core-set (arXiv:1708.00489), or random
    strategy: str = one_of("entropy", "margin", "coreset", "random")
    num_clips: int = at_least(20, 1)  # clips per round


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
