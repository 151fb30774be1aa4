# SPDX-License-Identifier: Apache-2.0
"""One training stage, and what surrounds it: evaluation, devices, checkpoints, log."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from particlejax.config.data import ScaleScheduleSpec, ScaleSpec
from particlejax.config.fields import Spec, at_least, between, named, one_of
from particlejax.config.objectives import OBJECTIVES
from particlejax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimSpec(Spec):
    """The optimizer and its learning-rate schedule."""

    name: str = one_of("adamw", "sgd")  # optimizer (train/optim.py)
    # steps of warmup and decay, after which the rate stays constant; 0: all steps of the stage. Set
    # it to the old number of steps to make a run longer without stretching its schedule
    schedule_steps: int = at_least(0, 0)
    learning_rate: float = at_least(1e-3, 0)  # peak learning rate
    warmup_ratio: float = between(0.1, 0, 1)  # fraction of the steps for linear warmup
    final_lr_ratio: float = between(0.01, 0, 1)  # final learning rate, as a fraction of the peak
    # decoupled weight decay; not applied to norms, biases and single vectors
    weight_decay: float = at_least(0.05, 0)
    b1: float = between(0.9, 0, 1, open_at="most")  # decay of AdamW's first moment
    # decay of AdamW's second moment; MAE pretraining uses 0.95
    b2: float = between(0.95, 0, 1, open_at="most")
    momentum: float = between(0.9, 0, 1, open_at="most")  # momentum of SGD
    grad_clip_norm: float = at_least(1.0, 0)  # maximum global gradient norm; 0: no clipping


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
class StageSpec(Spec):
    """One training stage. Set `num_steps` or `num_epochs`; the other is 0."""

    num_steps: int = at_least(0, 0)  # number of optimizer steps; 0: see `num_epochs`
    # number of passes over the training clips; 0: see `num_steps`
    num_epochs: float = at_least(0.0, 0)
    batch_size: int = at_least(32, 1)  # packed rows per batch, over all devices
    # number of micro-batches per optimizer step; their gradients are summed
    grad_accum_steps: int = at_least(1, 1)
    # initial parameters: name of an earlier stage, or RUN_DIR or RUN_DIR:STAGE of another run; '':
    # the experiment's init_from for the first stage
    init_from: str = ""
    # training losses by name, with their settings; their weighted sum is minimized
    objectives: Mapping[str, Any] = named(OBJECTIVES)
    optim: OptimSpec = OptimSpec()
    finetune: FinetuneSpec = FinetuneSpec()  # parameters to train
    # adversarial training and sharpness-aware minimization
    robust: RobustSpec = RobustSpec()
    # overrides of the experiment's model section
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # overrides of the experiment's data section
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # overrides of the experiment's particles section
    particles: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale_schedule: ScaleScheduleSpec = ScaleScheduleSpec()  # scales of the training clips
    val_split: str = "val"  # validation split; '': none
    val_every_steps: int = at_least(0, 0)  # steps between validations; 0: ten a run
    # decay of the parameters' moving average, which evaluation then uses; 0: none
    ema_decay: float = between(0.0, 0, 1, open_at="most")
    # validation metric that selects the best checkpoint; '': the last checkpoint
    best_metric: str = ""
    best_mode: str = one_of("max", "min")  # whether a larger or smaller `best_metric` is better
    # validations without a better `best_metric` before the stage stops; 0: never
    early_stopping_patience: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class MeasureSpec(Spec):
    """How clips are measured."""

    scale: ScaleSpec = ScaleSpec()  # overrides of the stage's data and particles
    # temporal clips and spatial crops per video; their probabilities are averaged
    views: tuple[int, int] = at_least((1, 1), 1)
    batch_size: int = at_least(32, 1)  # packed rows per batch, over all devices


@dataclasses.dataclass(frozen=True)
class EvalSpec(MeasureSpec):
    """The evaluation at the end of a stage with objective classify."""

    splits: tuple[str, ...] = ("val",)  # splits to evaluate on


@dataclasses.dataclass(frozen=True)
class MeshSpec(Spec):
    """Devices per mesh axis; -1 (at most once): all remaining devices."""

    data: int = at_least(-1, -1)  # devices for data parallelism
    fsdp: int = at_least(1, -1)  # devices that shard the batch, parameters and optimizer state
    tensor: int = at_least(1, -1)  # devices that shard layer widths
    sequence: int = at_least(1, -1)  # devices that shard the tokens of a row

    def check(self) -> None:
        """Raises UserError for an axis without devices and for several axes of -1."""
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size == 0:
                raise UserError(f"MeshSpec.{axis} is 0: use 1 or more devices, or -1 for the rest.")
        if list(sizes.values()).count(-1) > 1:
            raise UserError("MeshSpec.data and others are -1: only one axis can take the rest.")


@dataclasses.dataclass(frozen=True)
class DistributedSpec(Spec):
    """Multi-process training (jax.distributed); empty settings are read from the environment."""

    # auto: start jax.distributed if the settings or the environment name peers; off: one process
    start: str = one_of("auto", "off")
    coordinator_address: str = ""  # HOST:PORT of the first process; '': from the environment
    num_processes: int = at_least(0, 0)  # number of processes; 0: from the environment
    process_id: str = ""  # index of this process, from '0'; '': from the environment
    # seconds without a heartbeat after which a process counts as lost and the others stop
    heartbeat_timeout_seconds: int = at_least(100, 1)
    initialization_timeout: int = at_least(300, 1)  # seconds to wait for all processes at startup


@dataclasses.dataclass(frozen=True)
class CheckpointSpec(Spec):
    """When checkpoints are saved."""

    save_interval_steps: int = at_least(200, 1)  # steps between checkpoints
    # number of newest checkpoints to keep; at least 2, so one is intact during a save
    max_to_keep: int = at_least(2, 2)


@dataclasses.dataclass(frozen=True)
class LogSpec(Spec):
    """Logging besides metrics.jsonl and TensorBoard."""

    every_steps: int = at_least(20, 1)  # steps between log entries
    # peak FLOP rate for utilization: the device's table entry, or measured matrix products
    peak_flops: str = one_of("table", "measured")
    wandb_project: str = ""  # Weights & Biases project; '': none
