# SPDX-License-Identifier: Apache-2.0
"""Data: every clip once an epoch, the same batches whoever reads them from wherever, bad clips left
out and named.
"""

import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from deadly_source import DeadlySource

from particlejax.benchmarks import dataloader as bench
from particlejax.benchmarks import decoders
from particlejax.config.experiment import AugmentSpec, DataSpec, Experiment, ParticleSpec
from particlejax.config.job_specs import BenchJob, BenchSpec
from particlejax.core.typing import UserError
from particlejax.data import clips, pipeline, sources
from particlejax.data.frame_cache import FrameCache
from particlejax.data.video.decode import Video
from particlejax.particles.types import Particles
from particlejax.train import run_dir

CUT = ParticleSpec("grid", (4, 16, 16))
DATA = DataSpec(
    num_frames=8,
    image_size=32,
    num_threads=1,
    augment=AugmentSpec(crop_scale=(0.5, 1.0), hflip_prob=0.5),
)


@pytest.fixture(scope="module")
def source(cache_dir: str) -> sources.Source:
    return sources.open_source("toybox:tiny", "train", cache_dir)


def batches(source: sources.Source, **changes: object) -> pipeline.TrainBatches:
    return dataclasses.replace(
        pipeline.TrainBatches(source, DATA, CUT, seed=3, num_rows=12), **changes
    )


def same(a: pipeline.LoadedBatch, b: pipeline.LoadedBatch) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)


def test_every_clip_once_an_epoch_in_another_order_each_time(source: sources.Source) -> None:
    made = batches(source)
    epochs = [sum((made.clip_indices(k) for k in range(4 * e, 4 * e + 4)), []) for e in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    np.testing.assert_array_equal(made[1].batch.clip_index.reshape(-1), made.clip_indices(1))


def test_threads_processes_and_resuming_change_nothing(source: sources.Source) -> None:
    made = batches(source)
    expected = [made[k] for k in range(5)]
    for data in (
        DATA,
        dataclasses.replace(DATA, num_threads=3),
        dataclasses.replace(DATA, num_workers=2),
    ):
        for a, b in zip(pipeline.read_batches(made, 2, 5, data), expected[2:], strict=True):
            same(a, b)


def test_a_worker_that_is_killed_ends_in_a_sentence(source: sources.Source) -> None:
    stream = pipeline.read_batches(
        batches(source), 0, 10**6, dataclasses.replace(DATA, num_workers=1)
    )
    next(stream)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(UserError, match="worker was killed.* fewer config.data.num_workers"):
        for _ in range(10**3):
            next(stream)


def test_a_clip_that_ends_its_worker_is_left_out_and_the_run_goes_on(
    source: sources.Source,
) -> None:
    order = batches(source).clip_indices(0) + batches(source).clip_indices(1)
    bad = {source[order[i]].name: of for i, of in ((2, signal.SIGSEGV), (14, signal.SIGABRT))}
    records = tuple(source[i] for i in range(len(source)))
    raising = [dataclasses.replace(r, video=b"no film") if r.name in bad else r for r in records]
    expected = batches(sources.ListSource(source.classes, tuple(raising)))
    made = batches(DeadlySource(source.classes, records, deadly=bad, home=os.getpid()))
    found = list(pipeline.read_batches(made, 0, 3, dataclasses.replace(DATA, num_workers=1)))
    assert [(clip.name, clip.reason) for loaded in found for clip in loaded.unreadable] == [
        (name, f"its decoder ended the process with {signal.Signals(of).name}")
        for name, of in bad.items()
    ]
    for k, loaded in enumerate(found):
        same(loaded, expected[k])


def test_processes_of_a_pod_share_one_global_batch(source: sources.Source) -> None:
    whole = batches(source)[2]
    parts = [batches(source, process_index=p, num_processes=4)[2] for p in range(4)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *(part.batch for part in parts))
    jax.tree.map(np.testing.assert_array_equal, joined, whole.batch)


def test_several_clips_share_a_row(source: sources.Source) -> None:
    data = dataclasses.replace(DATA, clips_per_row=3)
    rows = batches(source, data=data, num_rows=4)[0].batch
    alone = batches(source)[0].batch
    assert rows.clip_index.shape == (4, 3) and sorted(rows.clip_index.reshape(-1)) == sorted(
        alone.clip_index.reshape(-1)
    )
    vision = rows.particles["vision"]
    np.testing.assert_array_equal(
        vision.payload.reshape(alone.particles["vision"].payload.shape),
        alone.particles["vision"].payload,
    )
    assert [int((vision.segment[0] == s).sum()) for s in (0, 1, 2, 3)] == [0, 8, 8, 8]


def test_views_show_every_clip_once_a_view_and_pad_the_last_batch(source: sources.Source) -> None:
    views = pipeline.EvalBatches(source, DATA, CUT, 0, num_rows=20, views=(2, 3))
    seen = np.concatenate([views[k].batch.clip_index.reshape(-1) for k in range(len(views))])
    assert sorted(seen[seen >= 0]) == sorted(list(range(48)) * 6)
    assert (seen == -1).sum() == -48 * 6 % 20


def test_an_unreadable_clip_leaves_its_place_empty(source: sources.Source) -> None:
    class Partly(sources.ListSource):
        pass

    records = [source[i] for i in range(12)]
    records[5] = dataclasses.replace(records[5], video=b"nonsense")
    made = batches(Partly(source.classes, tuple(records)))
    loaded = made[0]
    assert [bad.name for bad in loaded.unreadable] == [records[5].name] and loaded.unreadable[
        0
    ].reason == "not a media file"
    assert sorted(loaded.batch.clip_index.reshape(-1)) == [-1] + [i for i in range(12) if i != 5], (
        "left out, never replaced"
    )


def test_whatever_a_decoder_raises_leaves_out_its_clip_alone(
    source: sources.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an error of another kind in each place where a decoder is at work
    raised = {
        "_decode": ValueError("no such layout"),
        "_convert": MemoryError(),
        "_rewind": IndexError("list index out of range"),
    }
    damaged = source[batches(source).clip_indices(0)[3]]
    for where, error in raised.items():
        plain = getattr(Video, where)

        def broken(self: Video, *args: object, fn: Callable = plain, e: Exception = error) -> Any:
            if self._source == damaged.video:
                raise e
            return fn(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Video, where, broken)
            loaded = batches(source)[0]
        assert [clip.name for clip in loaded.unreadable] == [damaged.name], where
        assert loaded.unreadable[0].reason.startswith(f"damaged: {type(error).__name__}: ")
        assert np.sum(loaded.batch.clip_index == -1) == 1


def test_too_many_unreadable_clips_are_judged_once_enough_were_tried(
    source: sources.Source,
) -> None:
    def tally(readable: int, unreadable: int, num_clips: int = 1000) -> pipeline.Tally:
        tried = range(readable + unreadable)
        parts = set(tried[:readable]), set(tried[readable:])
        return pipeline.Tally(num_clips, 0.5, *parts)

    assert tally(0, 3, 3).is_nothing_readable() and tally(0, 20).is_nothing_readable()
    assert not (tally(0, 19).is_nothing_readable() or tally(1, 2, 3).is_nothing_readable())
    assert not tally(1, 2, 3).is_over_limit(), "a few clips are no share"
    assert tally(19, 21, 40).is_over_limit() and not tally(20, 20, 40).is_over_limit()
    assert not tally(19, 21).is_over_limit() and tally(2, 19).is_over_limit(), "chance"
    made = batches(source, data=dataclasses.replace(DATA, train_fraction=0.5))
    *_, last = pipeline.read_batches(made, 0, 3, made.data)
    assert (last.tally.num_clips, last.tally.num_tried) == (24, 24)


def test_clips_from_memory_are_the_decoded_ones(source: sources.Source) -> None:
    record, cache = source[7], FrameCache()
    for seed in range(4):
        fresh = clips.load(record, DATA, np.random.default_rng(seed))
        data = dataclasses.replace(DATA, ram_cache_gib=0.1)
        kept = clips.load(record, data, np.random.default_rng(seed), cache=cache)
        np.testing.assert_array_equal(fresh.frames, kept.frames)
        np.testing.assert_array_equal(fresh.frame_starts, kept.frame_starts)
    assert (record.video, 32) in cache
    made = batches(source, data=data, num_rows=48, cache=cache)
    assert [made[0], made[0]] and all((source[i].video, 32) in cache for i in range(48))
    assert (record.video, 32) not in pickle.loads(pickle.dumps(cache)), "a worker fills its own"


def test_memory_and_decoder_agree_on_what_is_on_display(source: sources.Source) -> None:
    with (
        FrameCache().open_frames(source[3].video, 16, 0.0) as decoding,
        FrameCache().open_frames(source[3].video, 16, 0.1) as kept,
    ):
        starts = np.arange(0, 1.9, 1 / kept.fps)
        for shift in (-6e-4, -4e-4, -3e-5, 0.0, 4e-4):
            np.testing.assert_array_equal(
                kept.frames_at(starts + shift), decoding.frames_at(starts + shift)
            )


def test_resizing_together_is_resizing_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for height, width, box, size in (
        (48, 40, (3.3, 5.1, 33.0, 44.7), 32),
        (20, 90, (0, 0, 20, 20), 33),
        (64, 64, (9, 1, 50, 63), 8),
    ):
        frames = rng.integers(0, 256, (5, height, width, 3), np.uint8)
        together = clips.crop_resize(frames, box, size)
        np.testing.assert_array_equal(
            clips.crop_resize(frames, box, size, True), together[:, :, ::-1]
        )
        with monkeypatch.context() as patch:
            patch.setattr(clips, "_MAX_BATCHED_RESIZE", 0)
            np.testing.assert_array_equal(together, clips.crop_resize(frames, box, size))
            np.testing.assert_array_equal(
                clips.crop_resize(frames, box, size, True), together[:, :, ::-1]
            )


def test_large_clips_are_seen_in_one_pass_unless_some_are_kept(tmp_path: Path) -> None:
    bench._make_video(tmp_path / "a.mp4", (320, 240), 1)
    record = sources.Record("a", str(tmp_path / "a.mp4"))
    data = DataSpec(
        num_frames=4,
        image_size=80,
        decode_short_side=120,
        augment=AugmentSpec(crop_scale=(0.3, 1.0), hflip_prob=0.5),
    )
    for seed in range(4):
        once, anew, kept = (
            clips.load(
                record, dataclasses.replace(data, ram_cache_gib=gib), np.random.default_rng(seed)
            )
            for gib in (0.0, 1e-9, 0.1)
        )
        np.testing.assert_array_equal(
            anew.frames, kept.frames, "whether there was room is not seen"
        )
        np.testing.assert_array_equal(once.frame_starts, kept.frame_starts)
        alike = np.corrcoef(once.frames.ravel(), kept.frames.ravel())[0, 1]
        assert 0.9 < alike < 0.9999, "the same part of noise, otherwise scaled"


def test_a_run_goes_on_with_more_memory_but_not_with_none(tmp_path: Path) -> None:
    def enter(gib: float) -> None:
        run_dir.enter(tmp_path / "run", Experiment(data=DataSpec(ram_cache_gib=gib)))

    enter(1.0)
    (tmp_path / "run" / "results.json").write_text("{}")  # else it would refuse nothing
    enter(2.5)
    with pytest.raises(UserError, match="ram_cache_gib was 2.5, is 0.0"):
        enter(0.0)


def test_start_and_end_bound_what_is_seen(source: sources.Source) -> None:
    whole = source[0]
    part = dataclasses.replace(whole, start=0.5, end=1.0)
    data = DataSpec(num_frames=6, image_size=64)
    seen = clips.load(part, data, clips.CENTER_VIEW)
    with Video(whole.video) as video:
        expected, _ = video.frames_at(0.5 + (np.arange(6) + 0.5) / 12, 64)
    np.testing.assert_array_equal(seen.frames, expected)
    np.testing.assert_allclose(np.diff(seen.frame_starts), 1 / 12, rtol=1e-5)


def test_a_clip_that_begins_past_the_end_of_its_file_is_bad(source: sources.Source) -> None:
    late = sources.ListSource(("a",), (dataclasses.replace(source[0], start=60.0, label=0),))
    loaded = batches(late, num_rows=1)[0]
    assert (
        loaded.unreadable[0].reason == "starts at 60 s but lasts 2 s"
        and (loaded.batch.clip_index == -1).all()
    )


def test_a_short_clip_holds_its_last_frame(source: sources.Source) -> None:
    frames = clips.load(
        source[0], DataSpec(num_frames=8, image_size=64, clip_seconds=4.0), clips.CENTER_VIEW
    ).frames
    np.testing.assert_array_equal(frames[4], frames[7])


def test_fraction_takes_the_same_clips_every_time() -> None:
    quarter = pipeline.subset_indices(960, 0.25)
    assert len(set(quarter.tolist())) == 240 and (np.diff(quarter) > 0).all()
    np.testing.assert_array_equal(quarter, pipeline.subset_indices(960, 0.25))


def test_particles_stand_where_their_frames_are_shown(source: sources.Source) -> None:
    for look in (clips.CENTER_VIEW, np.random.default_rng(1)):
        seen = clips.load(source[0], DATA, look)
        made = clips.make_particles(seen, DATA, CUT, np.random.default_rng(0))["vision"]
        times = np.unique(made.place[:, 0])
        np.testing.assert_allclose(times, [0.5, 1.5], atol=1e-6)
        np.testing.assert_allclose(made.extent[:, 0], 1.0, atol=1e-6)
        assert all(abs(t - times[i // 4]) <= 0.5 for i, t in enumerate(seen.frame_starts)), (
            "sound counts from the same start"
        )


def test_payloads_are_normalised(source: sources.Source) -> None:
    seen = clips.load(source[0], DATA, clips.CENTER_VIEW)

    def cut(data: DataSpec, spec: ParticleSpec) -> Particles:
        made = clips.make_particles(seen, data, spec, np.random.default_rng(0))["vision"]
        assert made.payload.dtype == np.uint8
        return dataclasses.replace(
            made, payload=clips.pixel_scale(data, spec).to_payload(made.payload)
        )

    made = cut(DATA, CUT)
    back = made.payload * DATA.image_std + DATA.image_mean
    np.testing.assert_allclose(
        back.reshape(-1, 4, 16, 16, 3)[0], seen.frames[:4, :16, :16] / 255, atol=1e-6
    )
    data = dataclasses.replace(DATA, temporal_mean_scale=0.25)
    quiet = cut(data, CUT).payload.reshape(-1, 4, 768)
    loud = made.payload.reshape(-1, 4, 768)
    np.testing.assert_allclose(quiet.mean(1), 0.25 * loud.mean(1), atol=1e-5)
    np.testing.assert_allclose(
        quiet - quiet.mean(1, keepdims=True), loud - loud.mean(1, keepdims=True), atol=1e-5
    )
    np.testing.assert_allclose(
        clips.pixel_scale(data, CUT).to_pixels(quiet.reshape(-1, 3072)), back, atol=1e-5
    )
    pyramid = ParticleSpec("pyramid", (2, 8, 8), num_levels=2)
    coarse = cut(DATA, pyramid).payload[-1].reshape(2, 8, 8, 3)
    average = (
        seen.frames[-4:, -16:, -16:].astype(float).reshape(2, 2, 8, 2, 8, 2, 3).mean((1, 3, 5))
    )
    np.testing.assert_allclose(
        coarse * DATA.image_std + DATA.image_mean, average / 255, atol=0.51 / 255
    )
    budget = cut(DATA, dataclasses.replace(CUT, budget=3))
    assert len(budget.segment) == 3


def test_the_benchmark_counts_the_cores_of_other_processes(tmp_path: Path) -> None:
    done = str(tmp_path / "done")
    busy = (
        "import time\nwhile time.process_time() < 0.5: pass\n"
        f"open({done!r}, 'w').close()\ntime.sleep(60)"
    )
    child = multiprocessing.get_context("spawn").Process(target=exec, args=(busy,))

    def work() -> None:
        child.start()
        while not (tmp_path / "done").exists():
            time.sleep(0.02)

    running = bench._time(work).cpu
    before = bench._cpu_seconds()
    child.kill()
    child.join()
    assert running > 0.4 and bench._cpu_seconds() > before - 0.05, "also after it has ended"


def test_the_benchmark_goes_on_without_a_package_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("")
    (tmp_path / "torchcodec" / "decoders.py").write_text(
        "raise OSError('libavutil.so is not there')"
    )
    (tmp_path / "decord.py").write_text(DECORD)
    monkeypatch.syspath_prepend(tmp_path)
    # none of these stays behind
    for name in ("torch", "torchcodec", "torchcodec.decoders", "decord"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        if name != "torch":
            del sys.modules[name]
    found, unusable = decoders.other_decoders([(b"the bytes of a file", np.array([0.1]))], 8)
    assert list(found) == ["decord, decodes and resizes"], "which takes bytes as a file"
    assert set(unusable) == {"torchcodec, exact seeks", "torchcodec, approximate seeks"}
    assert set(unusable.values()) == {"OSError: libavutil.so is not there"}


DECORD = """
class VideoReader:
    def __init__(self, file, width, height, num_threads):
        assert file.read() == b"the bytes of a file"
    get_avg_fps = lambda self: 25.0
    __len__ = lambda self: 9
    get_batch = lambda self, chosen: self
    asnumpy = lambda self: None
"""


def test_the_benchmark_measures_a_worker_process(cache_dir: str) -> None:
    experiment = BenchJob(
        data=DataSpec(cache_dir=cache_dir, num_threads=1),
        bench=BenchSpec(batch_size=2, memory_clips=20),
    )
    found = bench._memory(experiment)
    assert found["num_clips"] == list(range(2, 21, 2)) and len(found["a worker process"]) == 10
    assert all(20 < mib < 10_000 for mib in found["a worker process"])
    assert found["a worker process"][-1] != found["this process, decoding itself"][-1]


def test_the_bare_loop_that_drops_decodes_less(tmp_path: Path) -> None:
    bench._make_video(tmp_path / "a.mp4", (64, 48), 2)
    times = np.array([0.1, 1.5])
    assert decoders.decode_only(
        str(tmp_path / "a.mp4"), times, drop=True
    ) < 0.7 * decoders.decode_only(str(tmp_path / "a.mp4"), times)
