# SPDX-License-Identifier: Apache-2.0
"""The training state of a stage and the step that updates it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from particlejax.config.training import FinetuneSpec, RobustSpec
from particlejax.core.typing import Metrics, Params
from particlejax.distributed import cluster, sharding
from particlejax.finetune import partition
from particlejax.losses import Mean
from particlejax.models.particle_model import Model
from particlejax.objectives import base
from particlejax.objectives.base import TEACHER, Measured, Objective
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
    loss, the gradients and the new parameters are finite, else 0. A metric that applies to no clip
    of the batch is NaN. With on_nan='skip' a non-finite step changes only the step number. Attacks
    perturb normalized pixels. With `accumulate` > 1 the rows are split into that many micro-batches
    under a scan; see `accumulate_gradients`.
    """
    objective = base.single(objective)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def measure(params: Params, batch: Batch, key: Array) -> Measured:
            model_params = partition.merge(tuning, params, state.frozen)
            if ema:  # for objectives with an EMA teacher
                model_params = {
                    **model_params,
                    TEACHER: partition.merge(
                        tuning, jax.lax.stop_gradient(state.average), state.frozen
                    ),
                }
            return objective.measure(model_params, model, batch, key, True)

        def gradient(
            params: Params, batch: Batch, key: Array, shares: Measured | None
        ) -> tuple[Params, Measured]:
            def loss(params: Params, batch: Batch, key: Array) -> tuple[Array, Measured]:
                measured = measure(params, batch, key)
                return objective.loss(measured, shares), measured

            if robust.attack != "none":  # attacks perturb normalized pixels
                batch = model.normalize(batch)
            return make_gradient(loss, robust)(params, batch, key)

        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        grads, measured = (
            accumulate_gradients(gradient, measure, accumulate)(state.params, batch, key)
            if accumulate > 1
            else gradient(state.params, batch, key, None)
        )
        metrics = objective.metrics(measured)
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
        keeps = []  # conditions to take the step
        if on_nan == "skip":
            keeps.append(finite)
        if cluster.is_multiprocess():  # one process alone leaves out such a step by itself
            keeps.append(jnp.any(batch.clip_index >= 0))
        if keeps:
            new_state = jax.tree.map(
                partial(jnp.where, reduce(jnp.logical_and, keeps)),
                new_state,
                replace(state, step=new_state.step),
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


def accumulate_gradients(
    gradient: Callable[[Params, Batch, Array, Measured], tuple[Params, Measured]],
    measure: Callable[[Params, Batch, Array], Measured],
    num_micro_batches: int,
) -> Callable[[Params, Batch, Array], tuple[Params, Measured]]:
    """The gradient and the means of a batch, from `num_micro_batches` micro-batches of its rows.

    Each mean has the share of the whole batch's weight that it has in `measure`, so that the loss
    is a mean over the clips it applies to, wherever they lie. gradient: (params, batch, key, shares
    of the means) -> the gradient of the loss with these shares, and the means.
    """

    def accumulated_gradient(params: Params, batch: Batch, key: Array) -> tuple[Params, Measured]:
        # Row r goes to part r mod parts, so that rows stay on their devices.
        micro_batches = jax.tree.map(
            lambda x: x.reshape(
                x.shape[0] // num_micro_batches, num_micro_batches, *x.shape[1:]
            ).swapaxes(0, 1),
            batch,
        )
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_micro_batches))
        weights = jax.lax.map(
            lambda micro_batch: _weights(measure, params, *micro_batch), (micro_batches, keys)
        )
        totals = jax.tree.map(lambda w: w.sum(), weights)
        shares = jax.tree.map(lambda w, t: jnp.where(t > 0, w / t, 0.0), weights, totals)

        def add(sums: Any, micro_batch: tuple[Batch, Array, Measured]) -> tuple[Any, None]:
            rows, key, shares = micro_batch
            grads, measured = gradient(params, rows, key, shares)
            parts = jax.tree.map(lambda share, mean: share * mean.value, shares, measured)
            return jax.tree.map(jnp.add, sums, (grads, parts)), None

        zeros = jax.tree.map(jnp.zeros_like, (params, totals))
        (grads, values), _ = jax.lax.scan(add, zeros, (micro_batches, keys, shares))
        return grads, jax.tree.map(Mean, values, totals)

    return accumulated_gradient


def _weights(measure: Callable[..., Measured], *args: Any) -> Measured:
    """The weights alone of the means that `measure` gives; computes nothing else, as they depend on
    masks and labels, not on the network.
    """
    jaxpr, shapes = jax.make_jaxpr(
        lambda *args: jax.tree.map(
            lambda mean: mean.weight, measure(*args), is_leaf=lambda x: isinstance(x, Mean)
        ),
        return_shape=True,
    )(*args)
    pruned, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals))
    inputs = [x for x, is_used in zip(jax.tree.leaves(args), used, strict=True) if is_used]
    weights = core.jaxpr_as_fun(jaxpr.replace(jaxpr=pruned))(*inputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), weights)


def jit_step(step: Step, state: TrainState, mesh: Mesh) -> Step:
    """The step compiled for the mesh, with its state donated."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        sharding.with_mesh(mesh, step),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
