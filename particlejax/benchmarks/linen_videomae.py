# SPDX-License-Identifier: Apache-2.0
"""The baseline: VideoMAE of `transformers` on torch, if both are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from particlejax import masks
from particlejax.config.model import MaskedAutoencoderSpec, ModelSpec
from particlejax.core.errors import install_line

_PACKAGES = ("torch", "transformers")


class Task(NamedTuple):
    """A measured task: `rows` clips of `size` (frames, rows, columns) at once, with tubelets of
    `base`.

    masked: the mask spec, None for classification. train: a full AdamW step, else a forward pass.
    """

    size: tuple[int, int, int]
    base: tuple[int, int, int]
    rows: int
    classes: int
    masked: MaskedAutoencoderSpec | None
    train: bool

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        frames, rows, columns = (n // b for n, b in zip(self.size, self.base, strict=True))
        return frames * rows * columns

    @property
    def payload(self) -> int:
        """Values of a tubelet."""
        return 3 * self.base[0] * self.base[1] * self.base[2]

    @property
    def hidden(self) -> int:
        """Masked tokens of a clip."""
        return (
            self.tokens - round(self.tokens * masks.visible_ratio(self.masked.mask_ratio))
            if self.masked
            else 0
        )


def missing() -> str:
    """Why the baseline cannot run on JAX's devices, '' if it can."""
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return (
            f"VideoMAE of transformers is skipped: {' and '.join(absent)} cannot be imported: run "
            f"`{install_line('peers')}` and measure again."
        )
    backend = jax.default_backend()
    if backend == "cpu":
        return ""
    import torch

    if backend == "gpu" and torch.cuda.is_available():
        return ""
    return (
        f"VideoMAE of transformers is skipped: this torch cannot use the {backend.upper()} that "
        "JAX uses."
    )


def operations(spec: ModelSpec, task: Task) -> int:
    """FLOPs of one clip, from matmul shapes: two per multiply-add; training is three forward passes
    (arXiv:2204.02311, B).
    """
    tokens, seen, width, narrow = (
        task.tokens,
        task.tokens - task.hidden,
        spec.width,
        spec.decoder_width,
    )
    # masked tokens are embedded too
    found = 2 * tokens * task.payload * width + spec.depth * _block(seen, width, spec.mlp_ratio)
    if task.masked:
        found += 2 * seen * width * narrow + spec.decoder_depth * _block(
            tokens, narrow, spec.mlp_ratio
        )
        found += 2 * task.hidden * narrow * task.payload
    else:
        found += 2 * width * task.classes
    return found * (3 if task.train else 1)


def _block(tokens: int, width: int, mlp: int) -> int:
    return 2 * tokens * width**2 * (4 + 2 * mlp) + 4 * tokens**2 * width


def build(spec: ModelSpec, task: Task, dtype: str, seed: int) -> tuple[Callable[[int], Any], int]:
    """A function that runs the task `number` times on random pixels, and the number of parameters.

    bfloat16: autocast. With JAX on a GPU, torch runs there too, compiled, with JAX's matmul
    precision (TF32).
    """
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.manual_seed(seed)
    model = _model(spec, task).to(device).train(task.train)
    count = sum(each.numel() for each in model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    run, inputs = model, _inputs(task, device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        run = torch.compile(model)

    def once() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            answer = run(**inputs)
        if not task.train:
            return answer.logits.float().softmax(-1)
        answer.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return answer.loss

    def times(number: int) -> Any:
        with torch.set_grad_enabled(task.train):
            for _ in range(number):
                last = once()
            return last.detach().cpu()  # waits for the device

    return times, count


def _model(spec: ModelSpec, task: Task) -> Any:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=task.size[1],
        patch_size=task.base[1],
        num_frames=task.size[0],
        tubelet_size=task.base[0],
        hidden_size=spec.width,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.mlp_ratio * spec.width,
        decoder_hidden_size=spec.decoder_width,
        decoder_num_hidden_layers=spec.decoder_depth,
        decoder_num_attention_heads=spec.decoder_num_heads,
        decoder_intermediate_size=spec.mlp_ratio * spec.decoder_width,
        num_labels=task.classes,
        attn_implementation="sdpa",
    )
    return (VideoMAEForPreTraining if task.masked else VideoMAEForVideoClassification)(config)


def _inputs(task: Task, device: str) -> dict[str, Any]:
    import torch

    frames, height, width = task.size
    made = {"pixel_values": torch.randn(task.rows, frames, 3, height, width)}
    if task.masked:
        order = torch.rand(task.rows, task.tokens).argsort(1)
        made["bool_masked_pos"] = order < task.hidden
    elif task.train:
        made["labels"] = torch.arange(task.rows) % task.classes
    return {name: each.to(device) for name, each in made.items()}
