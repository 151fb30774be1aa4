# SPDX-License-Identifier: Apache-2.0
"""Parity and speed of the published sizes against their references, on random weights: a row of a
table for each.

    pip install torch==2.13.0 transformers==5.23.0 && \
        pip install --no-deps pytorchvideo==0.1.5 fvcore iopath parameterized
    taskset -c 0 python tests/parity.py [MODEL ...]

The largest difference of the first output over its largest number, and medians of seven interleaved
passes of one example. On one core, because the two libraries' threads would wait for each other.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import make_fixtures
import numpy as np
import transformer_references

sys.path.insert(0, str(Path(__file__).parents[1]))
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import formats, names

REPETITIONS = 7


CNNS = ("x3d_xs", "x3d_s", "x3d_m", "x3d_l", "i3d_r50", "c3d")
TRANSFORMERS = (
    "videomae_base",
    "videomae_pretraining_base",
    "vivit_base",
    "timesformer_base",
    "vjepa2_large",
    "videoprism_base",
    "videoprism_text_base",
    "ast_base",
    "minilm",
    "clip_base_32",
    "siglip_base_16",
)


def cnn(name: str) -> Any:
    """The reference network of a published size, with random weights, that answers with logits."""
    make_fixtures.without_torchvision()
    import torch
    from pytorchvideo.models import hub

    torch.manual_seed(0)
    wide = ((64,), (128,), (256, 256), (512, 512), (512, 512))
    net = (
        make_fixtures.c3d(torch, wide, (8192, 4096, 4096, 487))
        if name == "c3d"
        else getattr(hub, name)()
    )
    make_fixtures.randomise(net)
    if name.startswith("x3d"):
        net.blocks[5].activation = None  # the softmax, which would hide differences
    return net


def transformer(name: str) -> transformer_references.Reference:
    """The same of a Transformer."""
    import transformers

    net = transformer_references.published(transformers)[name]()
    transformer_references.randomise(net)
    return transformer_references.Reference(
        net, transformer_references.answer(backbones.find_backbone(name).kind)
    )


def ours(name: str, net: Any) -> tuple[backbones.Backbone, Any]:
    """Our network with the reference's weights, by way of a file."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.save(net.state_dict(), Path(folder) / "weights.pth")
        arrays = formats.read(Path(folder) / "weights.pth")
    backbone = backbones.build_backbone(backbones.find_backbone(name))
    shapes = backbones.parameter_shapes(backbone)
    known = names.names_of(backbone.spec.kind, shapes, backbones.position_grids(backbone))
    params, report = names.import_params(shapes, arrays, known)
    constants = {key for key, _ in net.named_buffers()}
    left = [
        key
        for key in report.unused
        if key not in constants and not transformer_references.idle(net, key)
    ]
    assert not report.missing and not left, report
    return backbone, jax.device_put(params)


def seconds(f: Callable[[], Any]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    f()
    return time.perf_counter() - begun


def main() -> None:
    """Prints a Markdown table."""
    print(
        "| model | example | largest difference / largest logit | ours, s | reference, s | ratio |"
    )
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:] or (*CNNS, *TRANSFORMERS):
        row(name)


def row(name: str) -> None:
    """Prints one row."""
    import torch

    torch.set_num_threads(1)
    reference = cnn(name) if name in CNNS else transformer(name)
    backbone, params = ours(name, reference if name in CNNS else reference.net)
    spec = backbone.spec
    if name in CNNS:
        given = (make_fixtures.video(spec.frames, spec.size, spec.size)[:1],)
        ask = partial(make_fixtures.answer, reference, *given)
    else:
        end = spec.net.text.end_token_id if spec.kind == "clip" else transformer_references.END
        given = transformer_references.inputs(spec.examples, spec.kind, 1, end)
        ask = partial(transformer_references.ask, reference, given)
    apply = jax.jit(lambda params, *given: backbone.apply(params, *given)[0])
    mine, theirs = np.asarray(apply(params, *given)), ask()
    theirs = theirs if name in CNNS else theirs["answer"]
    pairs = [
        (seconds(lambda: jax.block_until_ready(apply(params, *given))), seconds(ask))
        for _ in range(REPETITIONS)
    ]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    difference = np.abs(mine - theirs).max() / np.abs(theirs).max()
    ratio = statistics.median(a / b for a, b in pairs)
    size = " and ".join(" x ".join(map(str, shape)) for shape, _ in spec.examples)
    print(
        f"| {name} | {size} | {difference:.1e} | {first:.3f} | {second:.3f} | {ratio:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
