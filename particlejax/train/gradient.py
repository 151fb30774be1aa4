# SPDX-License-Identifier: Apache-2.0
"""Gradients of a training step: plain, adversarial (payloads perturbed), or sharpness-aware (SAM).

All are pure functions (params, batch, key) -> (gradient, metrics) of one loss (params, batch, key)
-> (loss, metrics); metrics is any tree of scalars.
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
from particlejax.core.typing import Params
from particlejax.particles.types import Batch
from particlejax.train import optim

Loss = Callable[[Params, Batch, Array], tuple[Array, Any]]
Gradient = Callable[[Params, Batch, Array], tuple[Params, Any]]
Noise = Mapping[str, Array]  # perturbations by modality, shaped like its payload

_FGSM_STEP = 1.25  # length of the single step, in epsilons (arXiv:2001.03994)
_PGD_TOTAL_STEP = 2.5  # total length of all steps, in epsilons (arXiv:1706.06083)


def make_gradient(loss: Loss, spec: RobustSpec) -> Gradient:
    """The gradient function that the spec selects."""
    gradient = _ATTACKS[spec.attack](loss, spec)
    return sharpness_aware(gradient, spec.sam_rho) if spec.sam_rho else gradient


def clean(loss: Loss, spec: RobustSpec) -> Gradient:
    """The gradient of the loss."""
    del spec

    def gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Any]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return grads, metrics

    return gradient


def sharpness_aware(gradient: Gradient, radius: float) -> Gradient:
    """The gradient at `radius` uphill of the parameters (SAM, arXiv:2010.01412); metrics are of
    that point.
    """

    def sam_gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Any]:
        uphill, _ = gradient(params, batch, key)
        scale = radius / jnp.maximum(optax.tree.norm(list(optim.in_order(uphill).values())), 1e-12)
        return gradient(jax.tree.map(lambda p, g: p + scale * g, params, uphill), batch, key)

    return sam_gradient


def adversarial(loss: Loss, spec: RobustSpec) -> Gradient:
    """The gradient at payloads perturbed by `fgsm` or `pgd` from a random start, within epsilon."""
    num_steps, step_size = (
        (1, _FGSM_STEP * spec.epsilon)
        if spec.attack == "fgsm"
        else (spec.attack_steps, _PGD_TOTAL_STEP * spec.epsilon / spec.attack_steps)
    )

    def gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Any]:
        def ascent_step(noise: Noise, i: Array) -> tuple[Noise, None]:
            del i
            uphill, _ = jax.grad(lambda n: loss(params, _perturb(batch, n), key), has_aux=True)(
                noise
            )
            return _sign_step(noise, uphill, step_size, spec.epsilon), None

        noise, _ = jax.lax.scan(
            ascent_step, _init_noise(batch, key, spec.epsilon), jnp.arange(num_steps)
        )
        return clean(loss, spec)(params, _perturb(batch, noise), key)

    return gradient


def free_adversarial(loss: Loss, spec: RobustSpec) -> Gradient:
    """The mean gradient along an ascent; each pass updates the perturbation (arXiv:1904.12843).

    The parameters get one update per batch, as in arXiv:1909.11764, so that schedules and averages
    keep their meaning.
    """
    step_size = _PGD_TOTAL_STEP * spec.epsilon / spec.attack_steps

    def gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Any]:
        def ascent_step(noise: Noise, i: Array) -> tuple[Noise, Any]:
            del i
            grad_fn = jax.grad(
                lambda p, n: loss(p, _perturb(batch, n), key), argnums=(0, 1), has_aux=True
            )
            (grads, uphill), metrics = grad_fn(params, noise)
            return _sign_step(noise, uphill, step_size, spec.epsilon), (grads, metrics)

        _, grads_and_metrics = jax.lax.scan(
            ascent_step, _init_noise(batch, key, spec.epsilon), jnp.arange(spec.attack_steps)
        )
        return jax.tree.map(lambda x: x.mean(axis=0), grads_and_metrics)

    return gradient


_ATTACKS: dict[str, Callable[[Loss, RobustSpec], Gradient]] = {
    "none": clean,
    "fgsm": adversarial,
    "pgd": adversarial,
    "free": free_adversarial,
}


def _init_noise(batch: Batch, key: Array, epsilon: float) -> Noise:
    """Uniform noise for every numeric payload; token ids get none."""
    float_payloads = {
        name: batch.particles[name].payload
        for name in ordered(batch.particles)
        if jnp.issubdtype(batch.particles[name].payload.dtype, jnp.floating)
    }
    keys = jax.random.split(jax.random.fold_in(key, len(float_payloads)), len(float_payloads))
    return {
        name: jax.random.uniform(subkey, payload.shape, payload.dtype, -epsilon, epsilon)
        for subkey, (name, payload) in zip(keys, float_payloads.items(), strict=True)
    }


def _perturb(batch: Batch, noise: Noise) -> Batch:
    particles = {
        name: replace(p, payload=p.payload + noise[name]) if name in noise else p
        for name, p in batch.particles.items()
    }
    return replace(batch, particles=particles)


def _sign_step(noise: Noise, uphill: Noise, step_size: float, epsilon: float) -> Noise:
    return jax.tree.map(
        lambda n, g: jnp.clip(n + step_size * jnp.sign(g), -epsilon, epsilon), noise, uphill
    )
