# SPDX-License-Identifier: Apache-2.0
"""Parity and speed of the published sizes against their references, on random weights: a row of a table for each.

    pip install torch==2.13.0 && pip install --no-deps pytorchvideo==0.1.5 fvcore iopath parameterized
    taskset -c 0 python tests/parity.py [MODEL ...]

The largest difference of the logits over the largest logit, and medians of seven interleaved passes of one clip. On
one core, because the two libraries' threads would wait for each other.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import make_fixtures
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from particlejax.adapt import formats, names
from particlejax.models import backbones

REPETITIONS = 7


def reference(name: str) -> Any:
    """The reference network of a published size, with random weights, that answers with logits."""
    make_fixtures.without_torchvision()
    import torch
    from pytorchvideo.models import hub

    torch.set_num_threads(1)
    torch.manual_seed(0)
    wide = ((64,), (128,), (256, 256), (512, 512), (512, 512))
    net = make_fixtures.c3d(torch, wide, (8192, 4096, 4096, 487)) if name == "c3d" else getattr(hub, name)()
    make_fixtures.randomise(net)
    if name.startswith("x3d"):
        net.blocks[5].activation = None  # the softmax, which would hide differences
    return net


def ours(name: str, net: Any) -> tuple[backbones.Backbone, Any]:
    """Our network with the reference's weights, by way of a file."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.save(net.state_dict(), Path(folder) / "weights.pth")
        arrays = formats.read(Path(folder) / "weights.pth")
    backbone = backbones.build(backbones.find(name))
    shapes = backbones.parameter_shapes(backbone)
    params, report = names.import_params(shapes, arrays, names.names_of(backbone.spec.kind, shapes))
    assert not report.missing and not report.unused, report
    return backbone, jax.device_put(params)


def seconds(f: Callable[[], Any]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    f()
    return time.perf_counter() - begun


def main() -> None:
    """Prints a Markdown table."""
    print("| model | clip | largest difference / largest logit | ours, s | reference, s | ratio |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:] or ["x3d_xs", "x3d_s", "x3d_m", "x3d_l", "i3d_r50", "c3d"]:
        net = reference(name)
        backbone, params = ours(name, net)
        video = make_fixtures.video(backbone.spec.frames, backbone.spec.size, backbone.spec.size)[:1]
        apply = jax.jit(lambda params, video, apply=backbone.apply: apply(params, video)[0])
        mine, theirs = np.asarray(apply(params, video)), make_fixtures.answer(net, video)
        pairs = [(seconds(lambda: jax.block_until_ready(apply(params, video))),  # noqa: B023
                  seconds(lambda: make_fixtures.answer(net, video))) for _ in range(REPETITIONS)]  # noqa: B023
        first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
        difference = np.abs(mine - theirs).max() / np.abs(theirs).max()
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {name} | {backbone.spec.frames} x {backbone.spec.size} x {backbone.spec.size} | {difference:.1e} | "
              f"{first:.3f} | {second:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
