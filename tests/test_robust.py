# SPDX-License-Identifier: Apache-2.0
"""Gradients at worse places, each against its formula on a loss that can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.config.experiment import RobustSpec
from particlejax.particles.types import Batch, Particles
from particlejax.train.gradient import make_gradient

W = {"w": jnp.array([3.0, -4.0])}
KEY = jax.random.key(5)


def batch(payload: np.ndarray) -> Batch:
    shape = payload.shape[:2]
    words = Particles(
        jnp.ones((*shape, 1), jnp.int32),
        jnp.zeros((*shape, 3)),
        jnp.ones((*shape, 3)),
        jnp.ones(shape, jnp.int32),
    )
    seen = Particles(jnp.asarray(payload, jnp.float32), words.place, words.extent, words.segment)
    none = jnp.zeros((shape[0], 1), jnp.int32)
    return Batch({"text": words, "vision": seen}, none, none, none.astype(jnp.float32), none)


def bowl(params: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
    """Half w squared: the payload is of no account."""
    del batch, key
    loss = jnp.sum(params["w"] ** 2) / 2
    return loss, {"loss": loss}


def linear(params: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
    """x w: the worst payload is a corner of the box, whose signs are those of w."""
    del key
    loss = jnp.mean(batch.particles["vision"].payload @ params["w"])
    return loss, {"loss": loss}


def test_sharpness_aware_is_the_gradient_further_up() -> None:
    grads, metrics = make_gradient(bowl, RobustSpec(sam_rho=0.5))(
        W, batch(np.zeros((1, 1, 2))), KEY
    )
    np.testing.assert_allclose(grads["w"], np.array([3.0, -4.0]) * (1 + 0.5 / 5), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 5.5**2 / 2, rtol=1e-6)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_goes_to_the_worst_corner_and_no_further(attack: str) -> None:
    """From anywhere in the box 1.25 epsilons reach one of its corners only from the middle on; 2.5
    of them always do.
    """
    x = np.random.default_rng(0).normal(size=(4, 8, 2))
    grads, metrics = jax.jit(make_gradient(linear, RobustSpec(attack=attack, epsilon=0.1)))(
        W, batch(x), KEY
    )
    moved = np.asarray(grads["w"]) - x.mean(axis=(0, 1))
    assert (np.abs(moved) <= 0.1 + 1e-6).all() and moved[0] > 0.07 and moved[1] < -0.07
    if attack == "pgd":
        np.testing.assert_allclose(moved, [0.1, -0.1], atol=1e-6)
    clean = float(linear(W, batch(x), KEY)[0])
    assert metrics["loss"] > clean + 0.5, "its loss is that of what was moved"


def test_free_is_the_mean_along_the_way() -> None:
    """One pass at the random start, then one after each step of 2.5 / 3 epsilons: at least the last
    of three is in the corner.
    """
    x = np.zeros((16, 16, 2))
    spec = RobustSpec(attack="free", epsilon=0.3, attack_steps=3)
    grads, _ = jax.jit(make_gradient(linear, spec))(W, batch(x), KEY)
    start = np.asarray(
        make_gradient(linear, RobustSpec(attack="free", epsilon=0.3, attack_steps=1))(
            W, batch(x), KEY
        )[0]["w"]
    )
    assert (np.abs(start) < 0.05).all(), "uniform noise has hardly a mean"
    uniform = np.linspace(-0.3, 0.3, 100001)
    expected = np.mean([np.clip(uniform + k * 0.25, -0.3, 0.3).mean() for k in range(3)])
    np.testing.assert_allclose(grads["w"], [expected, -expected], atol=0.02)


def test_without_any_it_is_the_gradient() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 2))
    grads, _ = make_gradient(linear, RobustSpec())(W, batch(x), KEY)
    np.testing.assert_allclose(grads["w"], x.mean(axis=(0, 1)), rtol=1e-5)
