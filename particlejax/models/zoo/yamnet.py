# SPDX-License-Identifier: Apache-2.0
"""YAMNet: audio events in windows of 0.975 s, by separable convolutions (MobileNet,
arXiv:1704.04861) on log-mel spectra.

As in tensorflow/models' research/audioset, with batch normalization folded into kernels and biases.
Legend: B examples, N samples, T spectra, F frequencies, M mel bands, C channels.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from particlejax.models.zoo.conv3d import Conv

_FLOOR = 1e-3  # added to mel magnitudes before the logarithm

# Channels and stride of each block.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


class YAMNet(nn.Module):
    """Mono audio float32 [B, N] in [-1, 1] -> multi-label logits [B, classes], and feature maps by
    name.

    Maps are [B, T, M, 1, C]. The mel filters are parameters, as in the published weights, but are
    not trained.
    """

    classes: int = 521  # of AudioSet
    width: int = 32  # of the first convolution
    blocks: tuple[tuple[int, int], ...] = BLOCKS
    samples: int = 15600
    rate: int = 16000  # samples per second
    window: int = 400  # samples per spectrum
    hop: int = 160  # samples between spectra
    frequencies: int = 257
    mels: int = 64

    @property
    def inputs(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and dtype of an example."""
        return (((self.samples,), "float32"),)

    @nn.compact
    def __call__(self, sound_BN: Array) -> tuple[Array, dict[str, Array]]:
        endpoints: dict[str, Array] = {}

        def record(name: str, x_B1TMC: Array) -> Array:
            endpoints[name] = x_B1TMC[:, 0, :, :, None]
            return x_B1TMC

        x = record("spectra", self._spectra(sound_BN)[:, None, :, :, None])
        x = record(
            "stem",
            nn.relu(Conv(self.width, (1, 3, 3), (1, 2, 2), "same", bias=True, name="stem")(x)),
        )
        for i, (width, stride) in enumerate(self.blocks, 1):
            groups = x.shape[-1]
            x = nn.relu(
                Conv(
                    groups,
                    (1, 3, 3),
                    (1, stride, stride),
                    "same",
                    groups,
                    bias=True,
                    name=f"depth{i}",
                )(x)
            )
            x = record(f"block{i}", nn.relu(nn.Dense(width, name=f"point{i}")(x)))
        endpoints["last"] = endpoints[f"block{len(self.blocks)}"]
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2, 3))), endpoints

    def _spectra(self, sound_BN: Array) -> Array:
        """Log-mel magnitudes [B, T, M]."""
        count = (sound_BN.shape[1] - self.window) // self.hop + 1
        frames = sound_BN[:, np.arange(count)[:, None] * self.hop + np.arange(self.window)]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)
        magnitude = jnp.abs(
            jnp.fft.rfft(
                frames * jnp.asarray(hann[None, None], jnp.float32), 2 * (self.frequencies - 1)
            )
        )
        # random filters may be negative
        return jnp.log(nn.relu(nn.Dense(self.mels, name="mel")(magnitude)) + _FLOOR)
