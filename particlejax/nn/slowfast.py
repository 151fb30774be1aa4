# SPDX-License-Identifier: Apache-2.0
"""SlowFast (arXiv:1812.03982): one pathway sees few frames with many channels, another all frames with few, and tells the first.

It takes video [B, T, H, W, 3], normalised as its weights expect, and returns logits [B, classes] and its feature maps by name.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.nn.cnn import Endpoints
from particlejax.nn.conv3d import Conv, Norm, max_pool, mean_logits, mean_pool
from particlejax.nn.resnet3d import Bottleneck

_EPSILON = 1e-5
_EVERY = 4  # frames of the fast pathway for one of the slow


class SlowFast(nn.Module):
    """Two ResNets side by side. Frames that four do not divide are left out at the end.

    Feature maps: 'stem' and 'stage1' to 'stage4' of the slow pathway with what the fast one has told it before the next stage,
    'fast1' to 'fast4', and 'joined': both at the end, the fast one's frames averaged in fours, of which the head sees the mean.
    """

    classes: int
    stem: int = 64
    thin: int = 8  # channels of the slow pathway for one of the fast
    depths: tuple[int, ...] = (3, 4, 6, 3)
    spans: tuple[int, ...] = (1, 1, 3, 3)  # frames that the slow pathway's blocks look at; the fast one's all look at three
    window: tuple[int, int] = (7, 7)  # rows and columns of the last pool; in time it takes all frames
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWC: Array) -> tuple[Array, Endpoints]:
        frames = x_BTHWC.shape[1] // _EVERY
        fast, ends = x_BTHWC[:, : frames * _EVERY].astype(self.dtype), {}
        # As the published weights were trained: evenly from the first frame to the last, rounded down.
        slow = fast[:, np.linspace(0, frames * _EVERY - 1, frames).astype(int)]
        slow, fast = self._stem("slow", slow, self.stem, 1), self._stem("fast", fast, self.stem // self.thin, 5)
        slow = ends["stem"] = self._told(slow, fast, 0)
        for i, (depth, span) in enumerate(zip(self.depths, self.spans, strict=True)):
            inner = self.stem * 2**i
            slow = self._stage("slow", slow, i, depth, inner, span)
            fast = ends[f"fast{i + 1}"] = self._stage("fast", fast, i, depth, inner // self.thin, 3)
            if i + 1 < len(self.depths):
                slow = self._told(slow, fast, i + 1)
            ends[f"stage{i + 1}"] = slow
        fours = jnp.mean(fast.reshape(fast.shape[0], frames, _EVERY, *fast.shape[2:]), axis=2)
        x = ends["joined"] = jnp.concatenate([slow, fours], axis=-1)
        x = mean_pool(x, (frames, *self.window)).astype(jnp.float32)
        return mean_logits(nn.Dense(self.classes, name="head")(x), probabilities=False), ends

    def _stem(self, name: str, x: Array, width: int, span: int) -> Array:
        x = Conv(width, (span, 7, 7), (1, 2, 2), dtype=self.dtype, name=f"{name}_stem")(x)
        x = nn.relu(Norm(_EPSILON, dtype=self.dtype, name=f"{name}_stem_norm")(x))
        return max_pool(x, (1, 3, 3), (1, 2, 2), "half")

    def _stage(self, name: str, x: Array, i: int, depth: int, inner: int, span: int) -> Array:
        for j in range(depth):
            x = Bottleneck(4 * inner, inner, 2 if i and not j else 1, (span, 1, 1), (1, 3, 3), dtype=self.dtype,
                           name=f"{name}_stage{i + 1}_block{j}")(x)
        return x

    def _told(self, slow: Array, fast: Array, i: int) -> Array:
        """The slow pathway's map beside what a convolution along time makes of the fast one's."""
        more = Conv(2 * fast.shape[-1], (7, 1, 1), (_EVERY, 1, 1), dtype=self.dtype, name=f"fuse{i}")(fast)
        more = nn.relu(Norm(_EPSILON, dtype=self.dtype, name=f"fuse{i}_norm")(more))
        return jnp.concatenate([slow, more], axis=-1)
