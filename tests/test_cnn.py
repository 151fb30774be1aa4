# SPDX-License-Identifier: Apache-2.0
"""3D CNNs: two formulations with one answer, parity with the references, features, frozen
statistics.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import make_fixtures
import numpy as np
import optax
import pytest

from particlejax.config.experiment import OptimSpec
from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.data.video.decode import Video
from particlejax.models.zoo import backbones, conv3d
from particlejax.models.zoo.convert import formats, names, resize
from particlejax.models.zoo.resnet3d import Bottleneck
from particlejax.train import optim

HERE = Path(__file__).parent
SHARED = HERE.parent / ".." / "shared"
I3D = SHARED / "weights" / "i3d-inception-kinetics400"
TINY = ("c3d_tiny", "i3d_r50_tiny", "x3d_tiny")


@cache
def imported(
    name: str,
) -> tuple[backbones.Backbone, Params, names.Names, names.Report, dict[str, np.ndarray]]:
    """A tiny backbone with its fixture's parameters, and the fixture."""
    arrays = formats.read(HERE / "fixtures" / f"{name}.safetensors")
    backbone = backbones.build_backbone(backbones.find_backbone(name))
    shapes = backbones.parameter_shapes(backbone)
    known = names.names_of(backbone.spec.kind, shapes)
    return (
        backbone,
        *(names.import_params(shapes, arrays, known)[:1]),
        known,
        names.import_params(shapes, arrays, known)[1],
        arrays,
    )


@cache
def forward(name: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a tiny backbone says of the fixture's video."""
    backbone, params, *_ = imported(name)
    return jax.jit(backbone.apply)(params, make_fixtures.video(*frames_and_size(backbone)))


def frames_and_size(backbone: backbones.Backbone) -> tuple[int, int, int]:
    """Of its clips."""
    return backbone.spec.frames, backbone.spec.size, backbone.spec.size


@pytest.mark.parametrize(
    ("groups", "kernel", "stride", "padding"),
    [
        (6, (3, 3, 3), (1, 2, 2), "half"),
        (6, (3, 1, 1), (2, 1, 1), "same"),
        (3, (1, 3, 3), (1, 2, 1), "none"),
        (1, (3, 3, 3), (2, 2, 2), "same"),
        (1, (1, 3, 3), (1, 2, 2), "half"),
        (1, (3, 1, 1), (1, 1, 1), "half"),
    ],
)
def test_both_formulations_agree(
    groups: int, kernel: conv3d.Triple, stride: conv3d.Triple, padding: str
) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 7, 6, 6)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(*kernel, 6 // groups, 6 if groups == 6 else 12)), jnp.float32)
    pad = conv3d.padding_widths(padding, x.shape[1:4], kernel, stride)

    def loss(
        f: Callable[..., jax.Array], x: jax.Array, k: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        y = f(x, k, stride, pad, groups)
        return jnp.sum(jnp.sin(y)), y

    for f in (conv3d.convolve_taps if groups > 1 else conv3d.convolve_planes, conv3d.convolve):
        (_, y), grads = jax.jit(jax.value_and_grad(partial(loss, f), (0, 1), has_aux=True))(x, k)
        (_, want), wanted = jax.jit(
            jax.value_and_grad(partial(loss, conv3d.convolve_xla), (0, 1), has_aux=True)
        )(x, k)
        np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), grads, wanted)


def test_the_platform_chooses_the_formulation_also_ahead_of_time() -> None:
    x, k = jnp.zeros((1, 4, 8, 8, 6)), jnp.zeros((3, 3, 3, 1, 6))
    traced = jax.jit(lambda x, k: conv3d.convolve(x, k, (1, 1, 1), ((1, 1),) * 3, 6)).trace(x, k)
    text = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert "convolution" not in text["cpu"]
    assert all(
        "feature_group_count = 6" in text[other] and "slice" not in text[other]
        for other in ("tpu", "cuda")
    )


@pytest.mark.parametrize("name", TINY)
def test_it_answers_as_the_reference(name: str) -> None:
    backbone, _, _, report, arrays = imported(name)
    logits, _ = forward(name)
    # X3D's reference ends in a softmax
    answer = jax.nn.softmax(logits) if backbone.spec.kind == "x3d" else logits
    assert not report.missing and report.unused == ["answer"]
    np.testing.assert_allclose(
        answer, arrays["answer"], rtol=1e-4, atol=1e-5 * np.abs(arrays["answer"]).max()
    )


@pytest.mark.parametrize("name", TINY)
def test_names_go_both_ways_exactly(name: str) -> None:
    _, params, known, report, arrays = imported(name)
    back = names.export_params(params, known, report)
    assert set(back) == set(arrays) - {"answer"}
    for key, array in back.items():
        assert array.dtype == arrays[key].dtype and np.array_equal(array, arrays[key]), key


@pytest.mark.parametrize(
    ("model", "file"), [("i3d_r50", "i3d_r50"), ("x3d_xs", "x3d_xs"), ("x3d_m", "x3d_m")]
)
def test_published_sizes_have_the_references_names_and_shapes(model: str, file: str) -> None:
    path = SHARED / "reference" / f"pytorchvideo_{file}.txt"
    if not path.exists():
        pytest.skip("no list of the reference's names here")
    lines = [line for line in path.read_text().splitlines() if line.startswith("blocks.")]
    want = {
        line.split(" ")[0]: tuple(
            int(n) for n in line.partition("(")[2].strip("),").split(",") if n.strip()
        )
        for line in lines
    }
    backbone = backbones.build_backbone(backbones.find_backbone(model))
    shapes = backbones.parameter_shapes(backbone)
    known = names.names_of(backbone.spec.kind, shapes)
    flat = tree.flatten(shapes)
    ours = {
        e.reference_name: e.layout.to_reference(np.empty(flat[e.path].shape, np.bool_)).shape
        for e in known.entries
    }
    assert ours | dict.fromkeys(known.counters, ()) == want


def test_published_sizes() -> None:
    counts = {
        name: tree.count(
            {
                k: v
                for k, v in tree.flatten(
                    backbones.parameter_shapes(backbones.build_backbone(spec))
                ).items()
                if not k.endswith(("/mean", "/var"))
            }
        )
        for name, spec in backbones.VARIANTS.items()
        if "tiny" not in name and not spec.inputs
    }
    assert round(counts["c3d"] / 1e6, 1) == 80.0 and counts["i3d"] == 12_689_984
    assert round(counts["i3d_r50"] / 1e6, 3) == 28.043
    assert all(round(counts[f"x3d_{size}"] / 1e6, 3) == 3.794 for size in ("xs", "s", "m"))
    assert round(counts["x3d_l"] / 1e6, 2) == 6.15


def test_training_leaves_statistics_alone() -> None:
    block = Bottleneck(4, 6, 2, (1, 1, 1), (3, 3, 3), groups=6, squeeze=8)
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 6, 4))
    rng = np.random.default_rng(0)  # not `init`, which takes long to compile
    before = jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(-0.2, 0.8, s.shape), jnp.float32),
        jax.eval_shape(block.init, jax.random.key(1), x)["params"],
    )
    before = tree.map_named(lambda name, a: jnp.abs(a) if name.endswith("/var") else a, before)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(block.apply({"params": p}, x) ** 2)))(before)
    step = optim.build_optimizer(OptimSpec(warmup_ratio=0.0, learning_rate=0.1), 10)
    trained = jax.jit(lambda p, g: optax.apply_updates(p, step.update(g, step.init(p), p)[0]))(
        before, grads
    )
    after = tree.flatten(trained)
    for name, array in tree.flatten(before).items():
        assert np.array_equal(array, after[name]) == name.endswith(("/mean", "/var")), name


@pytest.mark.parametrize("name", TINY)
def test_features_are_the_means_of_their_maps(name: str) -> None:
    backbone, params, *_ = imported(name)
    pixels = ((make_fixtures.video(*frames_and_size(backbone)) * 0.225 + 0.45) * 255).astype(
        np.float32
    )
    logits, ends = forward(name)
    normal = backbones.normalize(backbone.spec, pixels)
    np.testing.assert_allclose(normal, make_fixtures.video(*frames_and_size(backbone)), atol=1e-5)
    assert (
        jax.eval_shape(lambda p, x: backbones.classify(backbone, p, x), params, pixels).shape
        == logits.shape
    )
    last = ends[backbone.spec.default_endpoint]
    assert last.shape[0] == 2 and last.ndim in (2, 5)
    pooled = jax.eval_shape(lambda p, x: backbones.features(backbone, p, x), params, pixels)
    whole = jax.eval_shape(
        lambda p, x: backbones.features(backbone, p, x, pool=False), params, pixels
    )
    assert pooled.shape == (2, last.shape[-1]) and whole.shape == last.shape
    with pytest.raises(UserError, match="no feature map 'stage9': choose one of"):
        jax.eval_shape(lambda p, x: backbones.features(backbone, p, x, "stage9"), params, pixels)


def test_probabilities_of_places_are_averaged() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 2, 3, 5)), jnp.float32)
    mean = jnp.mean(jax.nn.softmax(logits), axis=(1, 2, 3))
    np.testing.assert_allclose(jax.nn.softmax(conv3d.mean_logits(logits, True)), mean, rtol=1e-5)
    np.testing.assert_allclose(
        conv3d.mean_logits(logits, False), jnp.mean(logits, axis=(1, 2, 3)), rtol=1e-5
    )


def test_another_number_of_classes_and_an_unknown_name() -> None:
    shapes = backbones.parameter_shapes(
        backbones.build_backbone(backbones.find_backbone("x3d_tiny"), 7)
    )
    assert shapes["head"]["bias"].shape == (7,)
    with pytest.raises(UserError, match="no model 'x3d_x': did you mean x3d_xs?"):
        backbones.find_backbone("x3d_x")


def test_in_bfloat16_it_answers_about_the_same() -> None:
    backbone, params, _, _, arrays = imported("c3d_tiny")
    half = backbones.build_backbone(
        dataclasses.replace(backbone.spec, net=backbone.spec.net.clone(dtype=jnp.bfloat16))
    )
    logits, ends = jax.jit(half.apply)(params, make_fixtures.video(*frames_and_size(backbone)))
    assert logits.dtype == jnp.float32 and ends["pool5"].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, arrays["answer"], atol=0.05 * np.abs(arrays["answer"]).max())


def test_positions_are_read_off_linearly() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2 * 3 * 4, 5)).astype(np.float32)
    np.testing.assert_allclose(
        resize.resize_positions(table, (2, 3, 4), (2, 3, 4)), table, rtol=1e-6
    )
    between = [0.75 * table[0] + 0.25 * table[1], 0.25 * table[0] + 0.75 * table[1]]
    np.testing.assert_allclose(
        resize.resize_positions(table, (24,), (48,))[1:3], between, rtol=1e-5, atol=1e-6
    )
    coarse, fine = (
        np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij"), -1)
        for size in ((4, 6), (8, 12))
    )
    finer = resize.resize_positions(coarse.reshape(-1, 2), (4, 6), (8, 12)).reshape(8, 12, 2)
    # a plane stays one between centres
    np.testing.assert_allclose(finer[1:-1, 1:-1], fine[1:-1, 1:-1], rtol=1e-9)
    with pytest.raises(
        UserError, match="24 positions does not fit the grid 2 x 3 to be resized to 4 x 6: give"
    ):
        resize.resize_positions(table, (2, 3), (4, 6))


def test_inflated_kernels_see_a_still_clip_as_the_image() -> None:
    rng = np.random.default_rng(0)
    kernel, image = (
        rng.normal(size=size).astype(np.float32) for size in ((3, 3, 2, 4), (1, 1, 8, 8, 2))
    )
    pad = conv3d.padding_widths("none", (5, 8, 8), (5, 3, 3), (1, 1, 1))
    video = conv3d.convolve_xla(
        jnp.repeat(image, 5, axis=1), resize.inflate(kernel, 5), (1, 1, 1), pad
    )
    want = conv3d.convolve_xla(jnp.asarray(image), kernel[None], (1, 1, 1), pad)
    np.testing.assert_allclose(video, want, rtol=1e-4, atol=1e-5)


def test_i3d_with_its_real_weights_says_what_the_original_said() -> None:
    path = I3D / "i3d_kinetics400_f32.safetensors"
    if not path.exists():
        pytest.skip("I3D's weights are not here")
    arrays, golden = formats.read(path), np.load(I3D / "golden.npz")
    backbone = backbones.build_backbone(backbones.find_backbone("i3d"))
    shapes = backbones.parameter_shapes(backbone)
    known = names.names_of("i3d", shapes)
    params, report = names.import_params(shapes, arrays, known)
    assert not report.missing and not report.unused and not report.reshaped and not report.cast
    back = names.export_params(params, known, report)
    assert set(back) == set(arrays) and all(np.array_equal(back[k], arrays[k]) for k in arrays)
    apply = jax.jit(backbone.apply)
    noise = np.random.default_rng(0).uniform(-1, 1, (1, 16, 224, 224, 3)).astype(np.float32)
    logits, ends = apply(params, noise)
    want = golden["synthetic16.logits"]
    assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()
    for name, end in ends.items():
        np.testing.assert_allclose(
            np.abs(end).mean(), golden[f"synthetic16.meanabs.{name}"], rtol=1e-4, err_msg=name
        )
    with Video(str(I3D / "v_CricketShot_g04_c01_rgb.gif")) as video:
        frames, _ = video.read_all()
    logits, _ = apply(params, np.asarray(backbones.normalize(backbone.spec, frames[None, 20:36])))
    labels = (I3D / "label_map.txt").read_text().splitlines()
    assert labels[int(jnp.argmax(logits))] == "playing cricket"


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of torch about torch.jit, which pytorchvideo calls
def test_live_against_torch() -> None:
    """With torch and pytorchvideo: other sizes than the fixtures', where heads see several
    places.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("pytorchvideo")
    table = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    grid = torch.from_numpy(table.reshape(1, 2, 3, 4, 5)).permute(0, 4, 1, 2, 3)
    larger = torch.nn.functional.interpolate(grid, (3, 5, 3), mode="trilinear", align_corners=False)
    np.testing.assert_allclose(
        resize.resize_positions(table, (2, 3, 4), (3, 5, 3)), larger[0].flatten(1).T, atol=1e-6
    )
    for (name, (net, (frames, rows, columns))), more in product(
        make_fixtures.references().items(), (0, 32)
    ):
        if name == "c3d_tiny" and more:
            continue  # its Dense layers fix the size
        backbone = backbones.build_backbone(backbones.find_backbone(name))
        shapes = backbones.parameter_shapes(backbone)
        known = names.names_of(backbone.spec.kind, shapes)
        params, report = names.import_params(
            shapes, {k: v.numpy() for k, v in net.state_dict().items()}, known
        )
        video = make_fixtures.video(frames, rows + more, columns + more)
        ours = jax.jit(backbone.apply)(params, video)[0]
        ours, theirs = (
            jax.nn.softmax(ours) if backbone.spec.kind == "x3d" else ours,
            make_fixtures.answer(net, video),
        )
        assert not report.missing and not report.unused
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max(), err_msg=name
        )
