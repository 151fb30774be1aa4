# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a stage does: the particles that were kept, and what was made of the rest."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from particlejax import sharding
from particlejax.apps import pictures
from particlejax.data import clips, pipeline, sources
from particlejax.data.decode import Unreadable
from particlejax.objectives import masked
from particlejax.particles import pack
from particlejax.particles.types import Particles
from particlejax.spec import DataSpec
from particlejax.train import run

_CLIP = 1  # of the measured split, the first to try


def draw_masked(workdir: Path, name: str, mesh: Mesh) -> None:
    """report/NAME_kept.png and NAME_reconstruction.png of a stage trained on masked particles."""
    stage, params = run.load_trained(f"{workdir}:{name}", mesh, {})
    spec = stage.spec.objectives["masked"]
    split = stage.spec.val or stage.data.split
    source = sources.open_source(stage.data.source, split, stage.data.cache_dir)
    found = _first_readable(source, stage.data)
    if found is None:
        return
    frames, times = found.frames, found.times
    particles = clips.particles_of(found, stage.data, stage.particles, np.random.default_rng(0))
    row = pipeline.row_of(stage.data, stage.particles)
    batch = stage.ready(pack.pack([pack.Clip(particles, -1, 0)], [0], row.slots, 1, row.clips))
    shape = type(spec)(**{**vars(spec), "predict": 1 - spec.keep})  # ask for everything that is hidden
    predict = jax.jit(sharding.on(mesh, lambda p, b: masked.predict_masked(shape, p, stage.model, b, jax.random.key(0), False)))
    answer = jax.tree.map(lambda x: np.asarray(x[0]), predict(params, jax.tree.map(np.asarray, batch)))
    folder = Path(workdir) / "report"
    folder.mkdir(exist_ok=True)
    seen = answer.visible
    pictures.kept_strip(frames, times, seen.place, seen.extent, folder / f"{name}_kept.png")
    rows = _rows(frames, times, answer, stage, spec.normalise)
    pictures.reconstruction(rows, times, folder / f"{name}_reconstruction.png")


def _first_readable(source: sources.Source, data: DataSpec) -> clips.Clip | None:
    for i in list(range(_CLIP, len(source))) + list(range(min(_CLIP, len(source)))):
        try:
            return clips.load(source[i], data, clips.CENTRE)
        except Unreadable:
            continue
    return None


def _rows(frames: np.ndarray, times: np.ndarray, answer: masked.Prediction, stage: run.Stage, normalised: bool
          ) -> dict[str, np.ndarray]:
    spec = stage.particles
    scale = clips.pixel_scale(stage.data, spec)
    payload = answer.predicted
    if normalised:  # the model knows each particle's contrast only up to these two numbers, which are lent to it here
        true = answer.query.payload
        payload = payload * true.std(-1, keepdims=True) + true.mean(-1, keepdims=True)

    def paint(particles: Particles, payload: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        real = particles.segment > 0
        pixels = scale.to_pixels(payload[real])
        return pictures.paint(pixels, particles.place[real], particles.extent[real], times, frames.shape[1:3], spec.base,
                              canvas)

    seen = paint(answer.visible, answer.visible.payload, np.full(frames.shape, 0.5))
    made = paint(answer.query, payload, seen)
    pixels = {"original": frames / 255, "seen by the\nencoder": seen, "reconstruction": made}
    if stage.data.still < 1:  # what stands still was hardly asked for: show what moves by itself
        pixels |= {f"{name},\nwhat moves": 0.5 + pixels[name] - pixels[name].mean(axis=0) for name in ("original", "reconstruction")}
    return {name: np.clip(video * 255, 0, 255).round().astype(np.uint8) for name, video in pixels.items()}
