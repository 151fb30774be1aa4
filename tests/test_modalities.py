# SPDX-License-Identifier: Apache-2.0
"""Sound, words and series on the clock of the frames; augmentation that leaves what happens alone;
sampling in time.
"""

import dataclasses
import io
import json
import math
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_media import recording

from particlejax.config.experiment import (
    AudioSpec,
    AugmentSpec,
    DataSpec,
    ParticleSpec,
    TextSpec,
    TimeseriesSpec,
)
from particlejax.core.typing import UserError
from particlejax.data import augment, clips, pipeline, sources
from particlejax.data.modalities import audio, tokenizer
from particlejax.data.video import timeout
from particlejax.data.video.decode import Unreadable, Video
from particlejax.particles import packing

RATE, FPS, SECONDS = 16000, 10, 8
# seconds at which a tenth of a second of a 1 kHz tone begins, and the frame flashes
BEEPS = (1.0, 3.5, 6.25)
CUT = ParticleSpec("grid", (4, 16, 16))


def film(container: str = "mp4", sound: bool = True) -> bytes:
    """Eight seconds whose frames flash and whose track beeps at the same moments."""
    file = io.BytesIO()
    clock = np.arange(SECONDS * RATE) / RATE
    wave = np.zeros(len(clock), np.float32)
    for beep in BEEPS:
        during = (clock >= beep) & (clock < beep + 0.1)
        wave[during] = 0.5 * np.sin(2 * np.pi * 1000 * clock[during])
    with av.open(file, "w", format=container) as out:
        video = out.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        track = out.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for i in range(SECONDS * FPS):
            level = 255 if any(abs(i / FPS - beep) < 0.06 for beep in BEEPS) else 20
            out.mux(
                video.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((48, 64, 3), level, np.uint8), format="rgb24"
                    )
                )
            )
        out.mux(video.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def beeping() -> bytes:
    return film()


def onset(sound: np.ndarray) -> float:
    """Seconds to where it first becomes loud."""
    return float(np.flatnonzero(np.abs(sound) > 0.2)[0]) / RATE


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_sound_stands_where_the_frames_stand(container: str) -> None:
    file = film(container)
    with Video(file) as video:
        origin = video.origin
    # the later ones are reached by a seek
    for start, beep in ((0.0, 1.0), (0.5, 1.0), (3.0, 3.5), (6.0, 6.25)):
        sound = audio.read(file, origin, start, 1.5, RATE)
        assert abs(start + onset(sound) - beep) < 0.015, (container, start)
    assert abs(len(audio.read(file, origin, 7.5, 3.0, RATE)) / RATE - 0.5) < 0.1, (
        "it ends where the track ends"
    )
    assert audio.read(file, origin, 60.0, 1.0, RATE) is None
    half = audio.read(file, origin, 0.5, 1.5, RATE // 2)
    assert abs(np.flatnonzero(np.abs(half) > 0.2)[0] / (RATE // 2) - 0.5) < 0.015, "any rate"


def loudness(sound: np.ndarray) -> float:
    """The amplitude of a tone, without its ends."""
    return float(np.sqrt(2 * np.mean(np.square(sound[RATE // 10 : -RATE // 10]))))


def test_sound_is_as_loud_as_its_channels() -> None:
    for layout in ("mono", "5.1", "7.1", "octagonal"):
        file = recording("matroska", ("pcm_s16le", layout, 48000, 0.125))
        assert loudness(audio.read(file, 0.0, 0.0, 1.0, RATE)) == pytest.approx(0.125, 0.02), layout
    # FFmpeg's own mix of two channels keeps the power of each
    file = recording("matroska", ("pcm_s16le", "stereo", 48000, 0.125 / 2**0.5))
    assert loudness(audio.read(file, 0.0, 0.0, 1.0, RATE)) == pytest.approx(0.125, 0.02)


def test_the_default_track_is_read() -> None:
    for default, expected in enumerate((0.0, 0.125)):
        tracks = [("pcm_s16le", "mono", RATE, amplitude) for amplitude in (0.0, 0.125)]
        file = recording("matroska", *tracks, default=default)
        assert loudness(audio.read(file, 0.0, 0.0, 1.0, RATE)) == pytest.approx(expected, 0.02)


def test_a_recording_goes_on_where_its_clock_restarts_and_its_sound_changes(tmp_path: Path) -> None:
    parts = [
        recording("mpegts", ("mp2", layout, rate, 0.125 / channels**0.5), seconds=seconds)
        for layout, rate, channels, seconds in (("stereo", 44100, 2, 3.0), ("mono", 48000, 1, 2.0))
    ]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(parts))
    for file in (str(path), path.read_bytes()):
        with Video(file) as video:
            assert video.duration == pytest.approx(5.0, abs=0.11)
            _, times = video.frames_at(np.arange(50) / 10 + 0.01)
            np.testing.assert_allclose(times, np.arange(50) / 10, atol=0.02)
            origin = video.origin
        for start in (0.0, 2.5, 3.5):
            sound = audio.read(file, origin, start, 1.5, RATE)
            assert abs(len(sound) - 1.5 * RATE) < 0.1 * RATE, start
            assert loudness(sound) == pytest.approx(0.125, 0.02), start


def test_an_order_of_channels_that_ends_the_process_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = bytearray(recording("mov", ("pcm_s16le", "7.1", RATE, 0.125)))
    tag = file.index(b"chan") + 8
    file[tag : tag + 4] = (128 << 16 | 8).to_bytes(4, "big")  # the sides before the back
    if audio._HOLDS_ANY_LAYOUT:
        assert loudness(audio.read(bytes(file), 0.0, 0.0, 1.0, RATE)) == pytest.approx(0.125, 0.02)
    monkeypatch.setattr(audio, "_HOLDS_ANY_LAYOUT", False)
    with pytest.raises(Unreadable, match=r"8 channels \(FL.* convert its sound to stereo"):
        audio.read(bytes(file), 0.0, 0.0, 1.0, RATE)


def test_a_tone_lies_in_its_band() -> None:
    spec = AudioSpec()
    clock = np.arange(RATE) / RATE
    centres = (mel_filters := audio.mel_filters(spec)).argmax(0) * spec.sample_rate / 512
    for hertz in (200.0, 1000.0, 4000.0):
        mel = audio.log_mel(np.sin(2 * np.pi * hertz * clock).astype(np.float32), spec)
        assert mel.shape == (98, 64) and mel_filters.shape == (257, 64)
        assert abs(centres[mel.mean(0).argmax()] / hertz - 1) < 0.1
    silence = audio.log_mel(np.zeros(100, np.float32), spec)
    assert silence.shape == (1, 64) and np.allclose(silence, np.log(1e-6))


DATA = DataSpec(
    num_frames=8,
    image_size=32,
    clip_seconds=2.0,
    modalities=("vision", "audio", "text", "timeseries"),
    timeseries=TimeseriesSpec(channels=("x", "y"), sample_rate=10, patch_length=5),
)
TABLE = b"time,x,y\n" + b"".join(
    b"%.2f,%.2f,%.2f\n" % (t, 2 * t, -t) for t in np.arange(0, 6.01, 0.25)
)


def test_modalities_share_a_clock_and_what_is_missing_has_no_particle(beeping: bytes) -> None:
    whole = sources.Record("a", beeping, 0, "a beep", start=3.0, end=5.0, series=TABLE)
    made = clips.make_particles(
        clips.load(whole, DATA, clips.CENTER_VIEW), DATA, CUT, np.random.default_rng(0)
    )
    assert set(made) == {"vision", "audio", "text", "timeseries"}
    slots = pipeline.row_shape(DATA, CUT).slots
    assert {m: (p.payload.shape, p.payload.dtype.name) for m, p in made.items() if m != "text"} == {
        m: ((s.length, s.payload_size), s.dtype) for m, s in slots.items() if m != "text"
    }
    # the flash and the beep at 3.5 s stand 0.5 s after the clip's start
    for name in ("audio", "vision"):
        loudest = made[name].payload.max(1).argmax()
        place, extent = made[name].place[loudest, 0], made[name].extent[loudest, 0]
        assert abs(place - 0.55) <= extent / 2 + 0.06, name
    first = clips.load(whole, DATA, clips.CENTER_VIEW)
    np.testing.assert_allclose(first.channels[:, 0], 2 * (3.0 + np.arange(20) / 10), atol=1e-5)
    np.testing.assert_allclose(made["timeseries"].place[:, 0], [0.25, 0.75, 1.25, 1.75], atol=1e-5)
    assert (made["text"].payload[:, 0] - 2).astype(np.uint8).tobytes() == b"a beep" and (
        made["text"].place[:, 0] == 1
    ).all()
    bare = sources.Record("b", film(sound=False), 0)
    lacks = clips.make_particles(
        clips.load(bare, DATA, clips.CENTER_VIEW), DATA, CUT, np.random.default_rng(0)
    )
    assert set(lacks) == {"vision"}
    batch = packing.pack([packing.Clip(made, 0, 0), packing.Clip(lacks, 0, 1)], [0, 1], slots, 2, 1)
    assert (batch.particles["audio"].segment[1] == 0).all() and (
        batch.particles["audio"].segment[0] == 1
    ).all()


def test_rows_have_room_for_all_that_is_read(beeping: bytes) -> None:
    rng = np.random.default_rng(0)
    for seconds in (
        0.495,
        0.025,
        0.01,
        *rng.uniform(0.03, 2.0, 60),
        *rng.integers(1, 400, 40) / 200,
    ):
        data = dataclasses.replace(DATA, modalities=("audio",), clip_seconds=float(seconds))
        sound = np.zeros(math.ceil(seconds * RATE - 1e-6), np.float32)
        made = clips.make_particles(
            clips.Clip(np.zeros(0), data.clip_seconds, sound), data, CUT, rng
        )
        assert len(made["audio"].segment) == pipeline.row_shape(data, CUT).slots["audio"].length, (
            seconds
        )
    record = sources.Record("a", beeping, series=TABLE)
    for seconds, own in ((0.495, 0.0), (1.7, 0.5), (1.0, 3.0), (2.495, 1.31)):
        data = dataclasses.replace(
            DATA,
            clip_seconds=seconds,
            modalities=("audio", "timeseries"),
            augment=AugmentSpec(speed_range=(0.5, 2.0), audio_shift_seconds=0.3),
            audio=AudioSpec(max_seconds=own),
            timeseries=TimeseriesSpec(
                channels=("x",), sample_rate=10, patch_length=3, max_seconds=own
            ),
        )
        for seed in range(2):
            seen = clips.load(record, data, np.random.default_rng(seed))
            made = clips.make_particles(seen, data, CUT, np.random.default_rng(seed))
            # raises where it does not fit
            packing.pack([packing.Clip(made, 0, 0)], [0], pipeline.row_shape(data, CUT).slots, 1, 1)


def test_sound_from_memory_is_the_decoded_one(beeping: bytes) -> None:
    data = dataclasses.replace(DATA, modalities=("audio",))
    record = sources.Record("a", beeping, start=2.9, end=4.9)
    decoded, kept = (
        clips.load(record, dataclasses.replace(data, ram_cache_gib=gib), clips.CENTER_VIEW).sound
        for gib in (0.0, 0.1)
    )
    assert abs(onset(decoded) - onset(kept)) < 2 / RATE and abs(len(decoded) - len(kept)) <= 1
    np.testing.assert_allclose(decoded[:20000], kept[:20000], atol=0.02)


def test_a_series_that_is_wrong_is_named(beeping: bytes) -> None:
    for table, reason in (
        (b"time,x\n0,1\n", "no column 'y'"),
        (b"time,x,y\n0,a,1\n", "not a number"),
    ):
        with pytest.raises(Unreadable, match=reason):
            clips.load(sources.Record("a", beeping, series=table), DATA, clips.CENTER_VIEW)


def test_rows_need_to_know_how_long_sound_is() -> None:
    with pytest.raises(UserError, match="set one of them"):
        pipeline.row_shape(DataSpec(modalities=("audio",)), CUT)
    with pytest.raises(UserError, match="has 'smell'"):
        pipeline.row_shape(DataSpec(modalities=("smell",)), CUT)


def tokenizer_file(folder: Path) -> str:
    """A tokenizer.json that, like MiniLM's, cuts and fills up to 128 and puts a text between two
    special tokens.
    """
    vocabulary = {
        word: i
        for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "ball", "falls"))
    }
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": {"type": "Lowercase"},
                "decoder": None,
                "truncation": {
                    "direction": "Right",
                    "max_length": 128,
                    "strategy": "LongestFirst",
                    "stride": 0,
                },
                "padding": {
                    "strategy": {"Fixed": 128},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "[PAD]",
                },
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": {
                    "type": "BertProcessing",
                    "cls": ["[CLS]", 2],
                    "sep": ["[SEP]", 3],
                },
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
            }
        )
    )
    return str(folder / "tokenizer.json")


def test_a_tokenizer_file_is_read(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path)
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install -e .\.\[text\]"):
            tokenizer.vocabulary(TextSpec(path))
        return
    assert tokenizer.vocabulary(TextSpec(path)) == 7
    np.testing.assert_array_equal(
        tokenizer.encode("The ball falls", TextSpec(path)), [2, 4, 5, 6, 3], "nothing fills up"
    )
    np.testing.assert_array_equal(
        tokenizer.encode("The ball falls", TextSpec(path, 4)), [2, 4, 5, 3], "the end stays"
    )
    with pytest.raises(
        UserError, match="length=2 leaves no room beside the 2 special tokens .*: use 3 or more"
    ):
        tokenizer.encode("x", TextSpec(path, 2))
    with pytest.raises(UserError, match="set it to the path of a tokenizer.json"):
        tokenizer.encode("x", TextSpec(str(tmp_path / "none.json")))


def test_bytes_are_cut_at_the_length() -> None:
    np.testing.assert_array_equal(
        tokenizer.encode("é!", TextSpec(max_length=2)), np.frombuffer("é".encode(), np.uint8) + 2
    )


EVERYTHING = AugmentSpec(
    color_jitter=0.5, randaug_num_ops=2, randaug_magnitude=0.7, random_erasing_prob=1.0
)


def test_augmentation_is_the_same_for_every_frame_and_pure() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (32, 40, 3), np.uint8)
    still = np.repeat(picture[None], 5, axis=0)
    seen = [
        augment.augment_frames(still, EVERYTHING, np.random.default_rng(seed)) for seed in (0, 0, 1)
    ]
    assert all((each == each[0]).all() and each.shape == still.shape for each in seen)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[0] != seen[2]).any() and (seen[0] != still).any()
    for name in augment._OPERATIONS:
        step = augment._draw_operation(name, 1.0, np.random.default_rng(0))
        assert augment._apply([step], picture).size == (40, 32)


def test_erasing_leaves_the_rest_alone() -> None:
    frames = np.full((3, 50, 50, 3), 200, np.uint8)
    for seed in range(20):
        changed = (
            augment.augment_frames(
                frames, AugmentSpec(random_erasing_prob=1.0), np.random.default_rng(seed)
            )
            != 200
        ).all(-1)
        assert 0.01 < changed.mean() < 0.4 and (changed == changed[0]).all()


def test_mixing_says_how_much_is_whose() -> None:
    a, b = (np.full((2, 40, 40, 3), level, np.uint8) for level in (0, 200))
    for seed in range(10):
        mixed, share = augment.mix(a, b, AugmentSpec(mixup_alpha=1.0), np.random.default_rng(seed))
        assert abs(mixed.mean() / 200 - (1 - share)) < 0.01 and np.ptp(mixed) == 0
        mixed, share = augment.mix(a, b, AugmentSpec(cutmix_alpha=1.0), np.random.default_rng(seed))
        assert np.isclose((mixed == 200).mean(), 1 - share) and set(np.unique(mixed)) <= {0, 200}


def test_bands_and_loudness() -> None:
    mel = np.ones((50, 40), np.float32)
    emptied = augment.mask_bands(
        mel, AugmentSpec(specaugment_num_masks=2), np.random.default_rng(1), 0.0
    )
    gone = emptied == 0
    assert (
        0 < gone.mean() < 0.65
        and (gone.all(0) | gone.all(1)[:, None])[gone].all()
        and (mel == 1).all()
    )
    sound = np.ones(10, np.float32)
    decibels = [
        20
        * np.log10(
            augment.random_gain(sound, AugmentSpec(audio_gain_db=6.0), np.random.default_rng(s))[0]
        )
        for s in range(50)
    ]
    assert -6 <= min(decibels) < -4 and 4 < max(decibels) <= 6


def ramp() -> sources.Record:
    """Two seconds at 30 frames a second whose brightness tells the frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="nut") as out:
        stream = out.add_stream("rawvideo", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        for i in range(60):
            picture = np.full((64, 64, 3), 4 * i, np.uint8)
            picture[:, 32:] = 0 if i % 2 else 255
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return sources.Record("ramp", file.getvalue(), 1)


def frames_of(clip: clips.Clip) -> np.ndarray:
    return (clip.frames[:, 5, 5, 0] / 4).round().astype(int)


def test_sampling_in_time() -> None:
    record, dense = (
        ramp(),
        DataSpec(num_frames=8, image_size=64, frame_sampling="dense", frame_stride=(3, 3)),
    )
    np.testing.assert_array_equal(
        np.diff(frames_of(clips.load(record, dense, clips.CENTER_VIEW))), 3
    )
    assert frames_of(clips.load(record, dense, clips.CENTER_VIEW))[[0, -1]].mean() == pytest.approx(
        28.5, abs=1
    ), "the centre"
    speeds = {
        int(
            np.diff(
                frames_of(
                    clips.load(
                        record,
                        dataclasses.replace(dense, frame_stride=(1, 4)),
                        np.random.default_rng(s),
                    )
                )
            )[0]
        )
        for s in range(30)
    }
    assert speeds == {1, 2, 3, 4}
    segments = DataSpec(num_frames=6, image_size=64, frame_sampling="segment")
    for seed in range(5):
        found = frames_of(clips.load(record, segments, np.random.default_rng(seed)))
        assert (found // 10 == np.arange(6)).all() and len(set(np.diff(found))) > 1
    span = DataSpec(
        num_frames=4, image_size=64, clip_seconds=0.8, augment=AugmentSpec(speed_range=(0.5, 2.0))
    )
    spans = [clips.load(record, span, np.random.default_rng(s)).seconds for s in range(40)]
    assert 0.4 <= min(spans) < 0.5 and 1.3 < max(spans) <= 1.6
    over = dataclasses.replace(dense, num_frames=30)  # 90 frames out of 60
    found = frames_of(clips.load(record, over, clips.CENTER_VIEW))
    assert found[0] <= 1 and (found[-10:] == 59).all(), "it holds its last frame"
    within = dataclasses.replace(record, start=0.5, end=1.0)
    assert frames_of(clips.load(within, over, clips.CENTER_VIEW)).max() == 29, (
        "and never looks past its end"
    )


def test_directed_classes_are_never_mirrored() -> None:
    data = DataSpec(
        num_frames=4, image_size=64, augment=AugmentSpec(hflip_prob=1.0, no_flip_classes=("left",))
    )
    record = ramp()
    for classes, mirrored in ((("right", "left"), False), (("left", "right"), True)):
        made = pipeline.TrainBatches(
            sources.ListSource(classes, (record,)),
            data,
            ParticleSpec("grid", (4, 64, 64)),
            0,
            num_rows=1,
        )
        payload = made[0].batch.particles["vision"].payload.reshape(4, 64, 64, 3)
        halves = payload[:, :, :32].std() > payload[:, :, 32:].std()
        assert halves == mirrored


def test_mixed_clips_carry_both_labels() -> None:
    data = DataSpec(
        num_frames=4, image_size=64, augment=AugmentSpec(mixup_alpha=0.8, cutmix_alpha=0.8)
    )
    records = tuple(dataclasses.replace(ramp(), name=str(i), label=i) for i in range(4))
    made = pipeline.TrainBatches(
        sources.ListSource(tuple("abcd"), records),
        data,
        ParticleSpec("grid", (4, 64, 64)),
        0,
        num_rows=4,
    )
    batch = made[0].batch
    assert (
        sorted(batch.second_label.reshape(-1)) == [0, 1, 2, 3]
        and (batch.second_label != batch.label).all()
    )
    assert ((batch.label_weight > 0) & (batch.label_weight < 1)).all()
    views = pipeline.EvalBatches(made.source, data, made.particles, 0, num_rows=4)[0].batch
    assert (views.label_weight == 1).all() and (views.second_label == -1).all(), (
        "what is measured is never mixed"
    )


def test_a_decoder_that_hangs_is_left_behind_and_not_tried_again() -> None:
    never, tried = threading.Event(), []

    def hang() -> None:
        tried.append(1)
        never.wait()

    for file in ("hanging.mp4", b"the bytes of a file"):
        with pytest.raises(Unreadable, match="not decoded after 0.05 s"):
            timeout.run_with_timeout(0.05, hang, file)
        for again in (file[:3] + file[3:], file):  # equal, not the same
            with pytest.raises(Unreadable, match="not decoded after 0.05 s"):
                timeout.run_with_timeout(60.0, hang, again)
    assert len(tried) == 2
    never.set()
    assert (
        timeout.run_with_timeout(5.0, lambda: 7, "another.mp4")
        == timeout.run_with_timeout(5.0, lambda: 7, b"other bytes")
        == 7
    )
    with pytest.raises(KeyError):
        timeout.run_with_timeout(5.0, lambda: {}["a"], "another.mp4")


def test_one_thread_waits_for_another_clip_after_clip() -> None:
    def mine() -> int:
        return timeout.run_with_timeout(5.0, threading.get_ident, "a.mp4")

    first = mine()
    assert first == mine() != threading.get_ident(), "to start one for every clip costs"
    with pytest.raises(UserError):
        timeout.run_with_timeout(
            5.0, lambda: (_ for _ in ()).throw(UserError("as it was")), "a.mp4"
        )
    assert first == mine()
    never = threading.Event()
    with pytest.raises(Unreadable):
        timeout.run_with_timeout(0.05, never.wait, "never.mp4")
    assert first != mine(), "it is left behind"
    never.set()
