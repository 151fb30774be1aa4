# SPDX-License-Identifier: Apache-2.0
"""Operations counted from shapes: products, loops, gradients and a whole Transformer, against sums
done by hand.
"""

import jax
import jax.numpy as jnp

from particlejax.config.experiment import ModelSpec
from particlejax.core import flops
from particlejax.models import particle_model as models
from particlejax.models.modality import ModalitySpec
from particlejax.particles.types import Particles

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))


def counted(f: object, *args: object) -> int:
    return flops.count(jax.jit(f).trace(*args).jaxpr)


def test_products_loops_and_gradients() -> None:
    assert counted(lambda a, b: a @ b, A, B) == 2 * 3 * 5 * 7
    assert (
        counted(lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0.0, None, length=4)[1], A, B)
        == 4 * 210
    )
    assert (
        counted(
            lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 7))), A, B
        )
        == 210
    )
    assert counted(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1)), A, B) == 3 * 210
    x, kernel = jnp.zeros((2, 9, 9, 9, 4)), jnp.zeros((3, 3, 3, 4, 6))
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    assert (
        counted(
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (1, 1, 1), "SAME", dimension_numbers=numbers
            ),
            x,
            kernel,
        )
        == 2 * 2 * 9**3 * 6 * 27 * 4
    )


def test_a_transformer_is_what_the_books_say() -> None:
    length, width, payload = 32, 16, 12
    spec = ModelSpec(width=width, depth=3, num_heads=2, distance_bias=False, unroll_layers=False)
    model = models.build(spec, {"vision": ModalitySpec(payload)})
    zeros = jnp.zeros((1, length, 3))
    particles = {
        "vision": Particles(
            jnp.zeros((1, length, payload)), zeros, zeros, jnp.ones((1, length), jnp.int32)
        )
    }
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), _Batch(particles)))
    found = counted(lambda p, x: model.apply(p, "encode", x)[0].x, params, particles)
    block = 24 * length * width**2 + 4 * length**2 * width
    assert found == 3 * block + 2 * length * width * (payload + 6 * 8 + 3)


class _Batch:
    def __init__(self, particles: dict) -> None:
        self.particles, self.label = particles, jnp.zeros((1, 1), jnp.int32)
