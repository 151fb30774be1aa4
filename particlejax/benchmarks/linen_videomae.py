# SPDX-License-Identifier: Apache-2.0
"""The baseline: VideoMAE of `transformers` on torch, if both are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from particlejax import masks
from particlejax.config.model import ModelSpec
from particlejax.config.objectives import MaskedAutoencoderSpec
from particlejax.core.errors import install_line

_PACKAGES = ("torch", "transformers")


class Task(NamedTuple):
    """A measured task: `batch_size` clips of `size` (frames, rows, columns) at once, with tubelets
    of `patch_size`.

    masked: the mask spec, None for classification. train: a full AdamW step, else a forward pass.
    """

    size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    batch_size: int
    num_classes: int
    masked: MaskedAutoencoderSpec | None
    train: bool

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        frames, rows, columns = (n // b for n, b in zip(self.size, self.patch_size, strict=True))
        return frames * rows * columns

    @property
    def payload(self) -> int:
        """Values of a tubelet."""
        return 3 * self.patch_size[0] * self.patch_size[1] * self.patch_size[2]

    @property
    def hidden(self) -> int:
        """Masked tokens of a clip."""
        return (
            self.tokens - round(self.tokens * masks.visible_ratio(self.masked.mask_ratio))
            if self.masked
            else 0
        )


def unavailable_reason() -> str:
    """Why the baseline cannot run on JAX's devices, '' if it can."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"VideoMAE of transformers is skipped: {' and '.join(missing)} cannot be imported: run "
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


def flops_per_clip(spec: ModelSpec, task: Task) -> int:
    """FLOPs of one clip, from matmul shapes: two per multiply-add; training is three forward passes
    (arXiv:2204.02311, B).
    """
    tokens, visible, width, decoder_width = (
        task.tokens,
        task.tokens - task.hidden,
        spec.width,
        spec.decoder_width,
    )
    # masked tokens are embedded too
    total = 2 * tokens * task.payload * width + spec.depth * _block_flops(
        visible, width, spec.mlp_ratio
    )
    if task.masked:
        total += 2 * visible * width * decoder_width + spec.decoder_depth * _block_flops(
            tokens, decoder_width, spec.mlp_ratio
        )
        total += 2 * task.hidden * decoder_width * task.payload
    else:
        total += 2 * width * task.num_classes
    return total * (3 if task.train else 1)


def _block_flops(tokens: int, width: int, mlp: int) -> int:
    return 2 * tokens * width**2 * (4 + 2 * mlp) + 4 * tokens**2 * width


def build_runner(
    spec: ModelSpec, task: Task, dtype: str, seed: int
) -> tuple[Callable[[int], Any], int]:
    """A function that runs the task `number` times on random pixels, and the number of parameters.

    bfloat16: autocast. With JAX on a GPU, torch runs there too, compiled, with JAX's matmul
    precision (TF32).
    """
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.manual_seed(seed % 2**32)
    model = _model(spec, task).to(device).train(task.train)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    forward, inputs = model, _inputs(task, device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        forward = torch.compile(model)

    def run_once() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            output = forward(**inputs)
        if not task.train:
            return output.logits.float().softmax(-1)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return output.loss

    def run_repeatedly(count: int) -> Any:
        with torch.set_grad_enabled(task.train):
            for _ in range(count):
                last = run_once()
            return last.detach().cpu()  # waits for the device

    return run_repeatedly, num_params


def _model(spec: ModelSpec, task: Task) -> Any:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=task.size[1],
        patch_size=task.patch_size[1],
        num_frames=task.size[0],
        tubelet_size=task.patch_size[0],
        hidden_size=spec.width,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.mlp_ratio * spec.width,
        decoder_hidden_size=spec.decoder_width,
        decoder_num_hidden_layers=spec.decoder_depth,
        decoder_num_attention_heads=spec.decoder_num_heads,
        decoder_intermediate_size=spec.mlp_ratio * spec.decoder_width,
        num_labels=task.num_classes,
        attn_implementation="sdpa",
    )
    return (VideoMAEForPreTraining if task.masked else VideoMAEForVideoClassification)(config)


def _inputs(task: Task, device: str) -> dict[str, Any]:
    import torch

    frames, height, width = task.size
    inputs = {"pixel_values": torch.randn(task.batch_size, frames, 3, height, width)}
    if task.masked:
        order = torch.rand(task.batch_size, task.tokens).argsort(1)
        inputs["bool_masked_pos"] = order < task.hidden
    elif task.train:
        inputs["labels"] = torch.arange(task.batch_size) % task.num_classes
    return {name: tensor.to(device) for name, tensor in inputs.items()}
