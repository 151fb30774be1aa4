# SPDX-License-Identifier: Apache-2.0
"""What a stage may say about fine-tuning: which parameters train, and what makes the step more robust than a plain gradient."""

import dataclasses

from particlejax.fields import at_least, between, one_of
from particlejax.typing import UserError


@dataclasses.dataclass(frozen=True)
class TuneSpec:
    """Which parameters train. What stands outside the encoder (head, pool, decoder) always does.

    linear: that alone. probe: that, with attention pooling. bitfit: and the encoder's biases (arXiv:2106.10199). lora
    (arXiv:2106.09685), ia3 (arXiv:2205.05638), adapter (arXiv:1902.00751), prefix (arXiv:2101.00190): and new parameters.
    """

    how: str = one_of("full", "linear", "probe", "bitfit", "lora", "adapter", "prefix", "ia3")
    also: str = ""  # regular expression of paths that train as well, such as 'norm/' or 'encoder/modality'; '': none
    rank: int = at_least(8, 1)  # of lora
    alpha: float = at_least(16.0, 0)  # of lora: its product counts alpha / rank
    targets: str = r"attention/(query|value)/kernel$"  # regular expression of the encoder's kernels that lora changes
    size: int = at_least(16, 1)  # hidden width of an adapter; number of prefix vectors
    layer_decay: float = between(1.0, 0.01, 1)  # learning rate of a block over that of the next one above (arXiv:2106.08254)
    unfreeze: float = between(0.0, 0, 1)  # share of the steps in which blocks begin to train, from the top (arXiv:1801.06146)


def check(tune: TuneSpec, pool: str, where: str) -> None:
    """Raises UserError where a frozen part would stay as random as it was born."""
    if tune.how == "probe" and pool != "attention":
        raise UserError(f"{where}.tune.how is 'probe' and the model's pool is {pool!r}: set config.model.pool to 'attention', or "
                        "tune.how to 'linear'.")
    if tune.how == "linear" and pool != "mean":
        raise UserError(f"{where}.tune.how is 'linear' and the model's pool is {pool!r}: set config.model.pool to 'mean', or "
                        "tune.how to 'probe'.")
