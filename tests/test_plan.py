# SPDX-License-Identifier: Apache-2.0
"""Plans: what is read from compiled programs is what was put there; the planned step is the one
that trains.
"""

import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from particlejax import main as entry
from particlejax.config.experiment import MeshSpec
from particlejax.config.job_specs import PlanSpec
from particlejax.core import accelerators, flops, hlo_cost
from particlejax.core.typing import UserError
from particlejax.distributed import sharding
from particlejax.jobs import plan
from particlejax.train import stage as run
from particlejax.train import train_step
from particlejax.train.train_state import abstract_state, as_abstract, initialize, jit_step

AXES = {"data": 2, "tensor": 4}
SMALL = (
    "stages.pretrain.batch_size=16",
    "model.unroll_layers=False",
    "model.width=16",
    "model.depth=1",
    "model.decoder_depth=1",
)
PROGRAM = """\
HloModule step, is_scheduled=true

%fused_add (param_0: bf16[12,64], param_1: s32[]) -> bf16[1,64] {
  %param_0 = bf16[12,64]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  ROOT %slice = bf16[1,64]{1,0} dynamic-slice(%param_0, %param_1, %param_1), dynamic_slice_sizes={1,64}
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %all-reduce.9 = f32[16]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %cut = f32[4]{0} slice(%all-reduce.9), slice={[0:4]}
}

%body (state: (s32[], bf16[12,64], /*index=2*/f32[16])) -> (s32[], bf16[12,64], f32[16]) {
  %state = (s32[], bf16[12,64]{1,0}, /*index=2*/f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[12,64]{1,0} get-tuple-element(%state), index=1
  %x = f32[16]{0} get-tuple-element(%state), index=2
  %layer = bf16[1,64]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused_add, backend_config={"estimated_cycles":"50"}
  %sum.1 = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %gathered = (f32[4]{0}, f32[16]{0}) all-gather-start(%sum.1), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %all = f32[16]{0} all-gather-done(%gathered)
  ROOT %out = (s32[], bf16[12,64]{1,0}, f32[16]{0}) tuple(%i, %w, %all)
}

%c (state: (s32[], bf16[12,64], f32[16])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: (s32[], bf16[12,64], f32[16])) -> f32[16] {
  %a = (s32[], bf16[12,64]{1,0}, f32[16]{0}) parameter(0)
  %loop = (s32[], bf16[12,64]{1,0}, f32[16]{0}) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %x = f32[16]{0} get-tuple-element(%loop), index=2
  %turned = f32[16]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0}}
  ROOT %r = f32[16]{0} all-reduce(%turned), replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%sum
}
"""


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(
        np.array(jax.devices()).reshape(2, 4),
        tuple(AXES),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


def test_a_program_is_read_with_its_loops_groups_and_slices() -> None:
    cost = hlo_cost.cost(PROGRAM, AXES)
    found = {(each.op, each.axes): (each.times, each.sent) for each in cost.collectives}
    assert found == {
        ("reduce-scatter", ("tensor",)): (12, 12 * 64 * 3 / 4),
        ("all-gather", ("tensor",)): (12, 12 * 16 * 3),
        ("all-reduce", ("data",)): (1, 2 * 64 / 2),
        ("collective-permute", ("data",)): (1, 64),
    }
    assert cost.cycles == 12 * 50 and cost.loops_without_trip_count == 0
    # as programs for TPUs say it
    by_condition = PROGRAM.replace('{"known_trip_count":{"n":"12"}}', "{}")
    assert by_condition != PROGRAM and hlo_cost.cost(by_condition, AXES) == cost
    assert (
        hlo_cost.cost(
            by_condition.replace("constant(12)", "parameter(0)"), AXES
        ).loops_without_trip_count
        == 1
    )
    named = PROGRAM.replace(
        "replica_groups=[4,2]<=[2,4]T(1,0)", "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}"
    )
    assert named != PROGRAM and hlo_cost.cost(named, AXES) == cost
    # a slice into fast memory with its index, the sum, what is gathered
    inside = 128 + 4 + (64 + 16) + (16 + 64)
    compared = 4 + 1
    assert cost.bytes == 12 * (inside + compared) + 2 * 128


def test_types_have_their_sizes() -> None:
    assert (
        hlo_cost.shape_bytes(
            "(f32[2,3]{1,0}, bf16[4], pred[5], s4[8], f8e4m3fn[7], s32[], token[])"
        )
        == 24 + 8 + 5 + 4 + 7 + 4
    )
    assert hlo_cost.shape_bytes("(f32[2]{0:T(128)S(1)}, f32[3]{0})", main_memory_only=True) == 12


@pytest.mark.parametrize(
    ("op", "axis", "sent"),
    [
        ("all-reduce", "data", 2 * 256 * 1 / 2),
        ("all-reduce", "tensor", 2 * 256 * 3 / 4),
        ("all-gather", "tensor", 256 * 3),
        ("reduce-scatter", "tensor", 256 * 3 / 4),
        ("all-to-all", "data", 256 / 2),
        ("collective-permute", "tensor", 256),
    ],
)
def test_collectives_of_real_programs_are_counted(
    op: str, axis: str, sent: float, mesh: Mesh
) -> None:
    pairs = [(i, (i + 1) % AXES[axis]) for i in range(AXES[axis])]
    exchange = {
        "all-reduce": lambda x: jax.lax.psum(x, axis),
        "all-gather": lambda x: jax.lax.all_gather(x, axis).sum(axis=0),
        "reduce-scatter": lambda x: jnp.resize(jax.lax.psum_scatter(x, axis, tiled=True), (64,)),
        "all-to-all": lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
        "collective-permute": lambda x: jax.lax.ppermute(x, axis, pairs),
    }[op]

    def thrice(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.sin(exchange(c)), None), x, None, length=3)[0]

    run = jax.jit(jax.shard_map(thrice, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    found = hlo_cost.cost(
        run.lower(jax.ShapeDtypeStruct((64,), np.float32)).compile().as_text(), dict(mesh.shape)
    )
    assert [(each.op, each.axes, each.times, each.sent) for each in found.collectives] == [
        (op, (axis,), 3, 3 * sent)
    ]


def test_a_loop_over_layers_reads_each_layer_once() -> None:
    weights = jax.ShapeDtypeStruct((10, 256, 256), np.float32)

    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = (
        jax.jit(layers)
        .lower(jax.ShapeDtypeStruct((8, 256), np.float32), weights)
        .compile()
        .as_text()
    )
    once = 10 * 256 * 256 * 4
    # far from 10 times as much, which whole operands would be
    assert once <= hlo_cost.cost(text, {"data": 1}).bytes < 4 * once


def test_parts_on_each_device_count_for_all(mesh: Mesh) -> None:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.shard_map(
            jnp.matmul,
            mesh=mesh,
            in_specs=(P("data"), P(None, "tensor")),
            out_specs=P("data", "tensor"),
        )(a, b)

    a, b = jax.ShapeDtypeStruct((6, 5), np.float32), jax.ShapeDtypeStruct((5, 8), np.float32)
    assert flops.count(jax.jit(product).trace(a, b).jaxpr) == 2 * 6 * 5 * 8


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("plan")
    code = entry.main(
        [
            "main",
            "--config=experiments/plan.py:tiny",
            f"--workdir={folder}",
            f"--config.overrides={SMALL}",
            "--config.meshes=({'data': 8}, {'data': 2, 'fsdp': 4})",
        ]
    )
    assert code == 0
    report = (folder / "report.md").read_text()
    assert "Collectives of a step" in report and "measured on this machine" in report
    return json.loads((folder / "results.json").read_text())


def test_the_plan_is_of_the_step_that_trains(planned: dict) -> None:
    spec = PlanSpec(experiment="experiments/quickstart.py:tiny", overrides=SMALL)
    stage, goal = plan.load_stage(spec, "auto")
    mesh = sharding.make_mesh(MeshSpec(data=2, fsdp=4))
    made = train_step.build_program(stage, goal, stage.spec.num_steps)
    state = initialize(
        stage.model,
        made.optimizer,
        stage.example,
        0,
        stage.spec.ema_decay,
        mesh,
        stage.spec.finetune,
    )
    promised = abstract_state(
        stage.model, made.optimizer, stage.example, stage.spec.ema_decay, mesh, stage.spec.finetune
    )
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding),
            as_abstract(state),
            promised,
        )
    )
    each = planned["pretrain"]["here data=2 fsdp=4"]
    on_first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    moments = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.opt_state))
    assert (each["bytes"]["parameters"], each["bytes"]["optimizer"]) == (on_first, moments)
    batch = plan.batch_shapes(stage, 16)
    assert (
        each["flops"]
        == flops.count(jit_step(made.step, state, mesh).trace(as_abstract(state), batch).jaxpr) / 8
    )
    feed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) / 8
    held = each["bytes"]["arguments"] - on_first - moments - feed
    assert abs(held) < 64  # step and seed; labels, which nothing reads, do not travel
    real = run.pipeline.row_shape(stage.data, stage.particles)
    assert batch.particles["vision"].payload.shape == (
        16,
        real.slots["vision"].length,
        real.slots["vision"].payload_size,
    )


def test_gradients_travel_once_where_only_rows_are_divided(planned: dict) -> None:
    each = planned["pretrain"]["here data=8"]
    reduced = sum(
        one["sent"]
        for one in each["collectives"]
        if one["op"] == "all-reduce" and one["axes"] == ["data"]
    )
    gradients = 2 * each["bytes"]["parameters"] * 7 / 8
    assert 0.95 * gradients < reduced < 1.1 * gradients  # norms and losses are small
    other = planned["pretrain"]["here data=2 fsdp=4"]
    assert {"fsdp"} & {axis for one in other["collectives"] for axis in one["axes"]}
    assert other["bytes"]["optimizer"] < each["bytes"]["optimizer"] / 2
    assert planned["best"]["here"] in ("data=8", "data=2 fsdp=4")


def test_estimates_name_what_binds_and_never_undercut_the_roofline() -> None:
    chip = accelerators.Chip(2**30, 100.0, 10.0, 5.0, clock_hz=2.0)
    sent = (hlo_cost.Collective("all-reduce", ("data",), 1, 40.0),)
    found = plan.estimates(300.0, hlo_cost.Cost(20.0, 0.0, sent, 0), chip)
    assert (
        found["seconds"] == {"compute": 3.0, "hbm": 2.0, "ici": 8.0}
        and found["bottleneck"] == "ici"
    )
    assert found["step"] == found["roofline"] == 8.0 and "compiler" not in found
    slow = plan.estimates(300.0, hlo_cost.Cost(20.0, 24.0, (), 0), chip)
    assert (slow["bottleneck"], slow["compiler"], slow["step"], slow["utilization"]) == (
        "compute",
        12.0,
        12.0,
        0.25,
    )


def test_kinds_of_chips_are_found_by_how_their_names_begin() -> None:
    class Device:
        platform = "tpu"

        def __init__(self, kind: str) -> None:
            self.device_kind = kind

    assert accelerators.chip_of(Device("TPU v5 lite"), 4) is accelerators.CHIPS["TPU v5 lite"]
    assert (
        accelerators.chip_of(Device("TPU v5p"), 4) is accelerators.CHIPS["TPU v5"]
        and accelerators.chip_of(Device("TPU v6 lite"), 4).clock_hz > 0
    )
    assert accelerators.chip_of(Device("TPU v99"), 4) is None


@pytest.mark.parametrize("devices", [1, 4, 16, 256])
def test_meshes_that_are_compared_fit(devices: int) -> None:
    for each in plan.candidate_meshes(devices):
        sizes = [getattr(each, axis) for axis in sharding.AXES]
        rest, over = divmod(devices, math.prod(size for size in sizes if size > 0))
        assert not over and (rest == 1 or -1 in sizes)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (PlanSpec(), "config.experiment is empty"),
        (PlanSpec(experiment="experiments/quickstat.py"), "did you mean experiments/quickstart.py"),
        (
            PlanSpec(experiment="experiments/quickstart.py:tiny", stage="x"),
            "config.stage='x' is not a stage of .* has pretrain, finetune",
        ),
        (
            PlanSpec(experiment="experiments/quickstart.py:tiny", overrides=("model.widht=3",)),
            "did you mean config.model.width",
        ),
        (
            PlanSpec(experiment="experiments/quickstart.py:tiny", overrides=("model.width=wide",)),
            "config.model.width is 'wide': write a whole number",
        ),
    ],
)
def test_what_cannot_be_planned_gets_a_sentence(spec: PlanSpec, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plan.load_stage(spec, "auto")


def test_scaling_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        "main",
        "--config=experiments/bench/scaling.py:tiny",
        f"--workdir={tmp_path}",
        "--config.topology=here:2",
    ]
    assert entry.main(argv) == 0
    results, report = ((tmp_path / name).read_text() for name in ("results.json", "report.md"))
    each = json.loads(results)["bench_scaling"]["here:2 fsdp=2"]
    assert (
        each["devices"] == 2
        and f"{each['bytes']['ici_bytes'] / 2**20:.2f}" in report
        and "Sharded over fsdp" in report
    )
    monkeypatch.setattr(plan, "plan_stage", None)  # nothing is left to prepare for
    assert entry.main(argv) == 0
    assert ((tmp_path / "results.json").read_text(), (tmp_path / "report.md").read_text()) == (
        results,
        report,
    )
    with pytest.raises(UserError, match="use 1 to 8 local devices, such as here:1"):
        plan.devices_of("here:9")


def test_a_compiler_of_another_version_gets_a_sentence() -> None:
    class Unreadable:
        def as_text(self) -> str:
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    with pytest.raises(UserError, match=f"pip install 'jax\\[tpu\\]=={jax.__version__}'"):
        plan._text(Unreadable())


def test_without_the_compiler_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "libtpu" else find(name, *more),
    )
    with pytest.raises(
        UserError, match=r"v5e:2x2' needs the TPU compiler: run `pip install -e \"\.\[plan\]\"`"
    ):
        plan.devices_of("v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'plan'")
def test_a_tpu_that_is_not_there_is_planned(tmp_path: Path) -> None:
    code = entry.main(
        [
            "main",
            "--config=experiments/plan.py:tiny",
            f"--workdir={tmp_path}",
            "--config.topology=v5e:2x2",
            f"--config.overrides={SMALL}",
        ]
    )
    assert code == 0
    each = json.loads((tmp_path / "results.json").read_text())["pretrain"]["v5e:2x2 fsdp=4"]
    assert (
        each["kind"].startswith("TPU")
        and each["estimates"]["compiler"] > 0
        and each["fits"]
        and each["bytes"]["ici_bytes"] > 0
    )
    assert len(plan.devices_of("v5p:1x1x1")) == len(plan.devices_of("v5e:1x1")) == 1
    with pytest.raises(UserError, match="is not a TPU topology"):
        plan.devices_of("v5e:3x77")
