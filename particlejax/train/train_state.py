# SPDX-License-Identifier: Apache-2.0
"""The training state of a stage and the step that updates it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from particlejax.config.training import FinetuneSpec, RobustSpec
from particlejax.core.typing import Metrics, Params
from particlejax.distributed import sharding
from particlejax.finetune import partition
from particlejax.models.particle_model import Model
from particlejax.objectives.base import TEACHER, Objective
from particlejax.particles.types import Batch
from particlejax.train import optim
from particlejax.train.gradient import make_gradient

Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
_FULL_FINETUNE, _NO_ROBUST = (
    FinetuneSpec(),
    RobustSpec(),
)  # all parameters train, with the plain gradient


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, steps done. seed: uint32; an array, so that all seeds share a compiled program.

    params: trainable parameters. average: their EMA, () if the stage keeps none. frozen: the other
    parameters, () if all train; `partition.merge` merges both into the model's parameters.
    """

    step: Array
    seed: Array
    params: Params
    opt_state: Any
    average: Params | tuple[()]
    frozen: Params | tuple[()] = ()

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate: the EMA if there is one."""
        return self.average or self.params


def initialize(
    model: Model,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    seed: int,
    ema: float,
    mesh: Mesh,
    tuning: FinetuneSpec = _FULL_FINETUNE,
) -> TrainState:
    """A state created sharded: no device ever holds more than its shard."""
    init_fn = _init_fn(model, optimizer, batch, ema, tuning)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda x: x.sharding, _with_shardings(init_fn, mesh))
        return jax.jit(init_fn, out_shardings=shardings)(np.uint32(seed % 2**32))


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    ema: float,
    mesh: Mesh,
    tuning: FinetuneSpec = _FULL_FINETUNE,
) -> TrainState:
    """Shapes, dtypes and shardings of the state that `initialize` makes; needs no computation and
    no device.
    """
    return _with_shardings(_init_fn(model, optimizer, batch, ema, tuning), mesh)


def _with_shardings(init_fn: Callable[[Array], TrainState], mesh: Mesh) -> TrainState:
    shapes = jax.eval_shape(init_fn, np.uint32(0))
    return jax.tree.map(
        lambda x, target: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target),
        shapes,
        sharding.param_shardings(shapes, mesh),
    )


def _init_fn(
    model: Model,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    ema: float,
    tuning: FinetuneSpec,
) -> Callable[[Array], TrainState]:
    def init(seed: Array) -> TrainState:
        key = jax.random.key(seed)
        params, frozen = partition.split(tuning, model.init(key, batch), key)
        average = jax.tree.map(jnp.copy, params) if ema else ()
        return TrainState(
            jnp.zeros((), jnp.int32), seed, params, optimizer.init(params), average, frozen
        )

    return init


def as_abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, for restoring."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def without_frozen(state: TrainState) -> TrainState:
    """The state that a checkpoint holds: without the frozen parameters, which the base run has."""
    return replace(state, frozen=())


def make_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema: float,
    accumulate: int,
    tuning: FinetuneSpec = _FULL_FINETUNE,
    robust: RobustSpec = _NO_ROBUST,
    on_nan: str = "stop",
) -> Step:
    """(state, batch) -> (state, metrics), pure; the random key is fold_in(seed, step).

    Metrics hold global and per-group norms of gradients and parameters, and 'finite': 1 if the
    loss, the gradients and the new parameters are finite, else 0. With on_nan='skip' a non-finite
    step changes only the step number. Attacks perturb normalized pixels. With `accumulate` > 1 the
    rows are split into that many micro-batches under a scan, weighted by their number of clips.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(params: Params, batch: Batch, key: Array) -> tuple[Array, Metrics]:
            model_params = partition.merge(tuning, params, state.frozen)
            if ema:  # for objectives with an EMA teacher
                model_params = {
                    **model_params,
                    TEACHER: partition.merge(
                        tuning, jax.lax.stop_gradient(state.average), state.frozen
                    ),
                }
            return objective(model_params, model, batch, key, True)

        def gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
            if robust.attack != "none":  # attacks perturb normalized pixels
                batch = model.normalize(batch)
            return make_gradient(loss, robust)(params, batch, key)

        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        grads, metrics = accumulate_gradients(gradient, accumulate)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if ema:
            # a small early decay lets the EMA forget the random initialization
            decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        metrics |= norms("grad_norm", grads) | norms("param_norm", params)
        finite = (
            jnp.isfinite(metrics["loss"])
            & jnp.isfinite(metrics["grad_norm"])
            & jnp.isfinite(metrics["param_norm"])
        )
        new_state = replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, average=average
        )
        if on_nan == "skip":
            new_state = jax.tree.map(
                lambda a, b: jnp.where(finite, a, b), new_state, replace(state, step=new_state.step)
            )
        return new_state, metrics | {"finite": finite.astype(jnp.float32)}

    return step


def norms(name: str, params: Params) -> Metrics:
    """Euclidean norms of a tree of parameters: `name` for all of it and 'name/GROUP' for each
    group.

    A group is the first two names of a path ('encoder/transformer'), or the only one above its
    arrays ('head').
    """
    squares: Metrics = {}
    for path, leaf in optim.in_order(params).items():
        group = "/".join(path.split("/")[:-1][:2])
        squares[group] = squares.get(group, jnp.zeros(())) + jnp.sum(
            jnp.square(leaf.astype(jnp.float32))
        )
    total = jnp.sqrt(sum(squares.values(), jnp.zeros(())))
    return {name: total} | {
        f"{name}/{group}": jnp.sqrt(square) for group, square in squares.items() if group
    }


def accumulate_gradients(gradient: Callable, num_micro_batches: int) -> Callable:
    """`gradient` averaged over `num_micro_batches` micro-batches of the rows, weighted by their
    number of clips.
    """
    if num_micro_batches == 1:
        return gradient

    def accumulated_gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
        # Row r goes to part r mod parts, so that rows stay on their devices.
        micro_batches = jax.tree.map(
            lambda x: x.reshape(
                x.shape[0] // num_micro_batches, num_micro_batches, *x.shape[1:]
            ).swapaxes(0, 1),
            batch,
        )
        num_clips = jnp.sum(micro_batches.clip_index >= 0, axis=(1, 2)).astype(jnp.float32)
        weights = num_clips / jnp.maximum(num_clips.sum(), 1.0)

        def add(totals: Any, micro_batch: tuple[Batch, Array, Array]) -> tuple[Any, None]:
            rows, weight, i = micro_batch
            gradient_and_metrics = gradient(params, rows, jax.random.fold_in(key, i))
            return jax.tree.map(lambda t, x: t + weight * x, totals, gradient_and_metrics), None

        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro_batches), key)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zero, (micro_batches, weights, jnp.arange(num_micro_batches)))[0]

    return accumulated_gradient


def jit_step(step: Step, state: TrainState, mesh: Mesh) -> Step:
    """The step compiled for the mesh, with its state donated."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        sharding.with_mesh(mesh, step),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
