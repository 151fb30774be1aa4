# SPDX-License-Identifier: Apache-2.0
"""Checked access to the values of a config.json of the library transformers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from particlejax.core.errors import UserError
from particlejax.models.zoo.vit_blocks import BlockStyle, StackSize

Triple = tuple[int, int, int]
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


class Settings(NamedTuple):
    """The values of a config.json or of a section of it; `file` stands in errors."""

    file: str
    values: Mapping[str, Any]

    def section(self, key: str) -> "Settings":
        """The settings under a key, none if it is missing."""
        values = self.values.get(key) or {}
        return Settings(f"{self.file} ({key})", values if isinstance(values, Mapping) else {})

    def get(self, key: str, default: Any, kind: type | tuple[type, ...] = int) -> Any:
        """A value of a type, positive if it is a number. Raises UserError for another value."""
        value = self.values.get(key)
        value = default if value is None else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.error(key, f"fetch {self.file} again")
        if is_number and not 0 < value < math.inf:
            raise self.error(key, "it must be a number above zero")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        return float(self.get(key, default, (int, float)))

    def side(self, key: str, default: int) -> int:
        """The side of a square, which may be given as both sides."""
        value = self.values.get(key)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != 2 or value[0] != value[1]:
                raise self.error(key, "only squares are read")
            return Settings(self.file, {key: value[0]}).get(key, default)
        return self.get(key, default)

    def triple(self, key: str, default: Triple) -> Triple:
        """Frames, rows and columns of a cuboid."""
        value = self.values.get(key) or default
        if not isinstance(value, Sequence) or len(value) != 3:
            raise self.error(key, "frames, rows and columns are needed")
        return tuple(Settings(self.file, {key: n}).get(key, 1) for n in value)

    def require(self, key: str, *supported: Any) -> None:
        """Raises UserError for another value than the first of `supported`, its default."""
        if (value := self.values.get(key)) is not None and value not in supported:
            choices = " or ".join(map(repr, supported))
            raise self.error(key, f"the network here has {choices} alone")

    def error(self, key: str, remedy: str) -> UserError:
        """An error about the value of a key."""
        return UserError(f"{self.file} has {key}={self.values.get(key)!r}: {remedy}.")

    def stack(
        self, heads: int = 12, mlp: int = 3072, width: int = 768, depth: int = 12
    ) -> StackSize:
        """The sizes of the blocks; defaults are the library's. Raises UserError for heads that do
        not divide the width.
        """
        return self.checked(
            StackSize(
                self.get("hidden_size", width),
                self.get("num_hidden_layers", depth),
                self.get("num_attention_heads", heads),
                self.get("intermediate_size", mlp),
            )
        )

    def checked(self, size: StackSize) -> StackSize:
        """Raises UserError for heads that do not divide the width."""
        if size.width % size.heads:
            raise UserError(
                f"{self.file} says {size.heads} attention heads for a width of {size.width}, which "
                "is no multiple: fetch it again."
            )
        return size

    def style(self, style: BlockStyle, activation: str, bias_key: str = "") -> BlockStyle:
        """The style with this config's activation, epsilon and biases; `activation` and the style's
        epsilon are the library's defaults.
        """
        name = self.get("hidden_act", activation, str)
        if name not in _ACTIVATIONS:
            raise self.error("hidden_act", f"choose one of {', '.join(_ACTIVATIONS)}")
        has_bias = not bias_key or self.get(bias_key, True, bool)
        if not bias_key:
            self.require("qkv_bias", True)
        return dataclasses.replace(
            style,
            activation=_ACTIVATIONS[name],
            epsilon=self.number("layer_norm_eps", style.epsilon),
            bias=tuple(bias and has_bias for bias in style.bias),
        )


class Keys(NamedTuple):
    """Names of the settings for a model and its weights, for errors.

    may_be_empty: whether a model without a name is that of the weights.
    """

    model: str = "config.model"
    weights: str = "config.weights"
    may_be_empty: bool = True

    @property
    def remedy(self) -> str:
        """What to do about a model that its weights contradict."""
        leave = f"leave {self.model} empty, which takes that of the weights, or "
        return f"{leave * self.may_be_empty}name other weights in {self.weights}"
