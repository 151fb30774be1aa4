# SPDX-License-Identifier: Apache-2.0
"""Gradients of a training step: plain, adversarial (payloads perturbed), or sharpness-aware (SAM).

All are pure functions (params, batch, key) -> (gradient, metrics) of one loss (params, batch, key)
-> (loss, metrics).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from particlejax.config.modalities import ordered
from particlejax.config.training import RobustSpec
from particlejax.core.typing import Metrics, Params
from particlejax.particles.types import Batch
from particlejax.train import optim

Loss = Callable[[Params, Batch, Array], tuple[Array, Metrics]]
Gradient = Callable[[Params, Batch, Array], tuple[Params, Metrics]]
Noise = Mapping[str, Array]  # perturbations by modality, shaped like its payload

_FGSM = 1.25  # length of the single step, in epsilons (arXiv:2001.03994)
_PGD = 2.5  # total length of all steps, in epsilons (arXiv:1706.06083)


def gradient_of(loss: Loss, spec: RobustSpec) -> Gradient:
    """The gradient function that the spec selects."""
    found = _ATTACKS[spec.attack](loss, spec)
    return sharpness_aware(found, spec.sam_rho) if spec.sam_rho else found


def plain(loss: Loss, spec: RobustSpec) -> Gradient:
    """The gradient of the loss."""
    del spec

    def gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return grads, metrics

    return gradient


def sharpness_aware(gradient: Gradient, radius: float) -> Gradient:
    """The gradient at `radius` uphill of the parameters (SAM, arXiv:2010.01412); metrics are of
    that point.
    """

    def worst(params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
        uphill, _ = gradient(params, batch, key)
        scale = radius / jnp.maximum(optax.tree.norm(list(optim.in_order(uphill).values())), 1e-12)
        return gradient(jax.tree.map(lambda p, g: p + scale * g, params, uphill), batch, key)

    return worst


def attacked(loss: Loss, spec: RobustSpec) -> Gradient:
    """The gradient at payloads perturbed by `fgsm` or `pgd` from a random start, within epsilon."""
    ascents, length = (
        (1, _FGSM * spec.epsilon)
        if spec.attack == "fgsm"
        else (spec.attack_steps, _PGD * spec.epsilon / spec.attack_steps)
    )

    def gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
        def climb(noise: Noise, i: Array) -> tuple[Noise, None]:
            del i
            uphill, _ = jax.grad(lambda n: loss(params, _moved(batch, n), key), has_aux=True)(noise)
            return _stepped(noise, uphill, length, spec.epsilon), None

        noise, _ = jax.lax.scan(climb, _start(batch, key, spec.epsilon), jnp.arange(ascents))
        return plain(loss, spec)(params, _moved(batch, noise), key)

    return gradient


def free(loss: Loss, spec: RobustSpec) -> Gradient:
    """The mean gradient along an ascent; each pass updates the perturbation (arXiv:1904.12843).

    The parameters get one update per batch, as in arXiv:1909.11764, so that schedules and averages
    keep their meaning.
    """
    length = _PGD * spec.epsilon / spec.attack_steps

    def gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
        def climb(noise: Noise, i: Array) -> tuple[Noise, Any]:
            del i
            both = jax.grad(
                lambda p, n: loss(p, _moved(batch, n), key), argnums=(0, 1), has_aux=True
            )
            (grads, uphill), metrics = both(params, noise)
            return _stepped(noise, uphill, length, spec.epsilon), (grads, metrics)

        _, passes = jax.lax.scan(
            climb, _start(batch, key, spec.epsilon), jnp.arange(spec.attack_steps)
        )
        return jax.tree.map(lambda x: x.mean(axis=0), passes)

    return gradient


_ATTACKS: dict[str, Callable[[Loss, RobustSpec], Gradient]] = {
    "none": plain,
    "fgsm": attacked,
    "pgd": attacked,
    "free": free,
}


def _start(batch: Batch, key: Array, epsilon: float) -> Noise:
    """Uniform noise for every numeric payload; token ids get none."""
    numbers = {
        name: batch.particles[name].payload
        for name in ordered(batch.particles)
        if jnp.issubdtype(batch.particles[name].payload.dtype, jnp.floating)
    }
    keys = jax.random.split(jax.random.fold_in(key, len(numbers)), len(numbers))
    return {
        name: jax.random.uniform(each, payload.shape, payload.dtype, -epsilon, epsilon)
        for each, (name, payload) in zip(keys, numbers.items(), strict=True)
    }


def _moved(batch: Batch, noise: Noise) -> Batch:
    particles = {
        name: replace(p, payload=p.payload + noise[name]) if name in noise else p
        for name, p in batch.particles.items()
    }
    return replace(batch, particles=particles)


def _stepped(noise: Noise, uphill: Noise, length: float, epsilon: float) -> Noise:
    return jax.tree.map(
        lambda n, g: jnp.clip(n + length * jnp.sign(g), -epsilon, epsilon), noise, uphill
    )
