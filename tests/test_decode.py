# SPDX-License-Identifier: Apache-2.0
"""Frames by presentation time: exact in every container, upright, square, and a named reason where
there are none.
"""

import csv
import io
import pickle
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import fuzz_media
import make_odd_files
import numpy as np
import pytest
from PIL import Image

from particlejax.data.clips import crop_resize
from particlejax.data.video import container as opening
from particlejax.data.video import timeout
from particlejax.data.video.decode import Unreadable, Video, raw_file
from particlejax.data.video.frame_ops import Region
from particlejax.data.video.packet_lookahead import PacketLookahead

SHARED = Path(__file__).parents[2] / "shared" / "data"
BITS, TALL, WIDE = 8, 32, 64  # a frame's number stands in its columns: 8 bars, white or black
RATE, TICK = 25, Fraction(1, 100)
CONTAINERS = [
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("webm", "libvpx"),
    ("ts", "libx264"),
    ("ts", "mpeg2video"),
    ("avi", "mpeg4"),
    ("avi", "libx264"),
    ("mpg", "mpeg1video"),
    ("mov", "mpeg4"),
]


def numbered(i: int) -> np.ndarray:
    bars = [(i >> bit & 1) * 255 for bit in range(BITS)]
    return np.broadcast_to(np.repeat(np.uint8(bars), WIDE // BITS)[None, :, None], (TALL, WIDE, 3))


def numbers(frames_THWC: np.ndarray) -> list[int]:
    bits = frames_THWC.mean(axis=(1, 3)).reshape(len(frames_THWC), BITS, -1).mean(axis=-1) > 127
    return [int(row @ (1 << np.arange(BITS))) for row in bits]


def write(
    path: Path | io.BytesIO,
    codec: str = "libx264",
    count: int = 200,
    *,
    ticks: list[int] | None = None,
    kind: str | None = None,
    aspect: str = "1",
    turn: int = 0,
    mirror: bool = False,
) -> Path | io.BytesIO:
    """Writes frames 0 .. count - 1, frame i at `ticks[i]` hundredths of a second, by default 25 a
    second.
    """
    with av.open(str(path) if isinstance(path, Path) else path, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDE, TALL, "yuv420p"
        stream.bit_rate, stream.gop_size = 4_000_000, 30
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.codec_context.time_base = TICK if ticks else Fraction(1, RATE)
        if turn or mirror:
            stream.set_display_rotation(turn, hflip=mirror)
        for i, at in enumerate(ticks or range(0, 4 * count, 4)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(i)), format="rgb24")
            frame.pts, frame.time_base = at, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_random_times_give_exact_frames(tmp_path: Path, suffix: str, codec: str) -> None:
    path = str(write(tmp_path / f"a.{suffix}", codec))
    with Video(path) as video:
        frames, times = video.read_all()
        assert numbers(frames) == list(range(200))
        np.testing.assert_allclose(times, np.arange(200) / RATE, atol=1e-3)
        assert video.duration == pytest.approx(8.0, abs=1.5 / RATE)
        assert video.fps == pytest.approx(RATE) and (video.width, video.height) == (WIDE, TALL)
    rng = np.random.default_rng(0)
    for trial in range(8):
        wanted = rng.integers(0, 200, 3)
        with Video(path) as video:
            for k in (wanted, wanted[::-1] // 2):  # a second request, earlier in the file
                frames, times = video.frames_at((k + 0.4) / RATE)
                assert numbers(frames) == k.tolist(), (trial, k)
                np.testing.assert_allclose(times, k / RATE, atol=1e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    # hundredths of a second; starts late
    ticks = np.cumsum(rng.choice([1, 2, 3, 4, 10, 60], 150)) + 50
    path = str(write(tmp_path / f"a.{suffix}", ticks=ticks.tolist()))
    starts = (ticks - ticks[0]) / 100
    with Video(path) as video:
        np.testing.assert_allclose(video.read_all()[1], starts, atol=1e-3)
        assert video.duration >= starts[-1]
    for _ in range(10):
        shown = rng.integers(0, 150, 4)
        wanted = starts[shown] + 0.6 * np.append(np.diff(starts), 1.0)[shown]
        with Video(path) as video:
            frames, times = video.frames_at(wanted)
        assert numbers(frames) == shown.tolist()
        np.testing.assert_allclose(times, starts[shown], atol=1e-3)


def test_edges_and_order(tmp_path: Path) -> None:
    with Video(str(write(tmp_path / "a.mp4", count=20))) as video:
        frames, times = video.frames_at([99.0, -1.0, 0.4, 0.4, 0.0])
        assert numbers(frames) == [19, 0, 10, 10, 0]
        assert (
            frames.dtype == np.uint8
            and times.dtype == np.float32
            and frames.shape == (5, TALL, WIDE, 3)
        )
        assert video.frames_at([])[0].shape == (0, TALL, WIDE, 3)


def test_seeks_only_where_it_saves_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, plain = [], Video._decode

    def counted(self: Video) -> object:
        for timed in plain(self):
            decoded.append(timed.time)
            yield timed

    monkeypatch.setattr(Video, "_decode", counted)
    path = str(write(tmp_path / "a.mp4"))
    for wanted, most in ((7.6, 40), (0.2, 8)):  # keyframes are 1.2 s apart
        decoded.clear()
        with Video(path) as video:
            video.frames_at([wanted])
        assert len(decoded) <= most


class Index:
    """An hour's index in the order of decoding, every third entry a B-frame shown before the one it
    follows.
    """

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 90_000

    def __getitem__(self, i: int) -> SimpleNamespace:
        self.asked += 1
        return SimpleNamespace(
            timestamp=40 * (i - 2 if i % 3 == 2 else i + 1), is_discard=i < 3 or i > 89_990
        )


def test_the_length_of_an_hour_is_found_at_the_ends_of_its_index() -> None:
    index = Index()
    kept = [
        entry.timestamp
        for entry in map(index.__getitem__, range(len(index)))
        if not entry.is_discard
    ]
    index.asked = 0
    stream = SimpleNamespace(index_entries=index, time_base=Fraction(1, 1000))
    assert opening.index_length(stream) == pytest.approx((max(kept) - min(kept)) / 1000)
    assert index.asked < 500


def test_frames_that_nobody_wants_are_dropped_and_the_others_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, plain = [], Video._decode

    def counted(self: Video) -> object:
        for timed in plain(self):
            decoded.append(timed.time)
            yield timed

    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"x264-params": "bframes=3:b-adapt=0:scenecut=0"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDE, TALL, "yuv420p"
        for i in range(120):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(i)), format="rgb24")
                )
            )
        container.mux(stream.encode(None))
    with Video(path) as video:
        whole, _ = video.read_all()
    monkeypatch.setattr(Video, "_decode", counted)
    wanted = np.arange(4, 100, 8)
    with Video(path) as video:
        frames, _ = video.frames_at((wanted + 0.5) / RATE)
        assert len(decoded) < 75, "of 101 to the last one wanted"
        np.testing.assert_array_equal(frames, whole[wanted])
        # others of the same file, some of them dropped before
        frames, _ = video.frames_at((wanted + 1.5) / RATE)
        np.testing.assert_array_equal(frames, whole[wanted + 1])


def display_order(rng: np.random.Generator, groups: int) -> list[int]:
    """Stamps in an order of decoding: of each group of up to five the last first, then the others
    in any order.
    """
    found, start = [0], 1
    for size in rng.integers(1, 6, groups):
        inner = rng.permutation(size - 1)
        found += [start + size - 1, *(start + inner).tolist()]
        start += size
    return found


def test_packets_are_judged_by_what_is_on_display() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = display_order(rng, int(rng.integers(1, 60)))
        wanted = np.sort(rng.uniform(0, len(order) + 2, 5)) / 10
        packets = [SimpleNamespace(pts=stamp, size=1) for stamp in order]
        given = list(PacketLookahead(iter(packets), 0.1, wanted))
        shown = {min(int(10 * time), len(order) - 1) for time in wanted}
        kept = {packet.pts for packet, seen in given if seen and packet is not None}
        assert kept == shown
        last = max(order.index(stamp) for stamp in order if stamp <= 10 * wanted[-1])
        assert [packet and packet.pts for packet, _ in given[: last + 1]] == order[: last + 1]
        assert given[last + 1 :] in ([(None, True)], []), (
            "the decoder gives what it holds, and nobody reads on"
        )


def test_nothing_is_decoded_after_the_last_frame_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, plain = [], PacketLookahead.__iter__

    def counted(self: PacketLookahead) -> object:
        for packet, shown in plain(self):
            given.append(packet)
            yield packet, shown

    monkeypatch.setattr(PacketLookahead, "__iter__", counted)
    path = str(write(tmp_path / "a.mp4"))
    with Video(path) as video:
        assert numbers(video.frames_at([0.1, 1.02])[0]) == [2, 25]
        assert given[-1] is None and given[-2].pts * given[-2].time_base <= 1.02
        assert numbers(video.frames_at([3.02, 0.5])[0]) == [75, 12], (
            "though the decoder was emptied"
        )


def scene(rng: np.random.Generator) -> np.ndarray:
    """Coloured blobs, 96 rows by 160 columns, no two quarters alike."""
    small = Image.fromarray(rng.integers(0, 256, (6, 10, 3), np.uint8))
    return np.asarray(small.resize((160, 96), Image.Resampling.BICUBIC))


def coarse(picture_HWC: np.ndarray) -> np.ndarray:
    """Means over blocks, of which pictures have 8 by 8: what is left of them is their colours and
    where these are.
    """
    height, width = (n // 8 for n in picture_HWC.shape[:2])
    return picture_HWC[: 8 * height, : 8 * width].reshape(8, height, 8, width, 3).mean(axis=(1, 3))


@pytest.mark.parametrize(("turn", "mirror"), [(0, False), (90, False), (180, True), (-90, True)])
@pytest.mark.parametrize(
    ("pix_fmt", "space", "aspect"),
    [("yuv420p", 1, "1"), ("yuvj420p", 5, "4/3"), ("yuv444p", 2, "1")],
)
def test_a_part_is_that_part_of_the_whole(
    tmp_path: Path, turn: int, mirror: bool, pix_fmt: str, space: int, aspect: str
) -> None:
    picture = scene(np.random.default_rng(0))
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, pix_fmt
        stream.codec_context.sample_aspect_ratio, stream.codec_context.colorspace = (
            Fraction(aspect),
            space,
        )
        stream.set_display_rotation(turn, hflip=mirror)
        for shift in (0, 40):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, shift, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    box = np.array([0.1, 0.25, 0.7, 0.95])
    with Video(str(tmp_path / "a.mp4")) as video:
        whole, _ = video.read_all()
        parts, times = video.regions_at([0.0, 0.05], Region(tuple(box), 40))
        mirrored, _ = video.regions_at([0.0, 0.05], Region(tuple(box), 40, flip=True))
    pixels = tuple(box * (video.width, video.height, video.width, video.height))
    np.testing.assert_allclose(times, [0, 0.04], atol=1e-6)
    np.testing.assert_array_equal(mirrored, parts[:, :, ::-1])
    for part, expected in zip(parts, crop_resize(whole, pixels, 40), strict=True):
        assert (
            abs(coarse(part) - coarse(expected)).mean()
            < 4
            < 20
            < abs(coarse(part) - coarse(expected[:, ::-1])).mean()
        )


def test_interlaced_films_are_decoded_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"x264-params": "tff=1:bframes=3:b-adapt=0"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDE, TALL, "yuv420p"
        for i in range(60):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(i)), format="rgb24")
                )
            )
        container.mux(stream.encode(None))
    with Video(path) as video:
        whole, _ = video.read_all()
        assert numbers(whole) == list(range(60)) and not video._can_drop, (
            "a field of a frame may be a packet of its own"
        )
        np.testing.assert_array_equal(
            video.frames_at((np.arange(3, 50, 7) + 0.5) / RATE)[0], whole[3:50:7]
        )


def test_bytes_equal_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", count=60)
    with Video(str(path)) as one, Video(path.read_bytes()) as other:
        for a, b in zip(
            one.frames_at([0.3, 2.0], 16), other.frames_at([0.3, 2.0], 16), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
@pytest.mark.parametrize("mirror", [False, True])
def test_display_matrix(tmp_path: Path, turn: int, mirror: bool) -> None:
    with Video(str(write(tmp_path / "a.mp4", count=4, turn=turn, mirror=mirror))) as video:
        frames, _ = video.read_all()
        assert frames.shape[1:3] == (video.height, video.width)
        stored = np.flip(frames, axis=2) if mirror else frames
        assert numbers(np.rot90(stored, -turn // 90, axes=(1, 2))) == [0, 1, 2, 3]
        if not mirror:
            with av.open(str(tmp_path / "a.mp4")) as container:
                assert next(container.decode(video=0)).rotation % 360 == turn % 360


def test_sizes(tmp_path: Path) -> None:
    with Video(str(write(tmp_path / "a.mp4", count=4))) as video:
        assert video.frames_at([0.1], 18)[0].shape == (1, 18, 36, 3)
        assert video.frames_at([0.1], 48)[0].shape == (1, 48, 96, 3)
        assert numbers(video.read_all(16)[0]) == [0, 1, 2, 3]
    with Video(str(write(tmp_path / "b.mp4", count=4, turn=90))) as video:
        assert video.frames_at([0.1], 16)[0].shape == (1, 32, 16, 3)
    with Video(str(write(tmp_path / "c.mkv", count=4, aspect="12/11"))) as video:
        assert (video.width, video.height) == (70, TALL) and video.frames_at([0.1], 16)[
            0
        ].shape == (1, 16, 36, 3)
    with Video(str(write(tmp_path / "d.mkv", count=4, aspect="1/2"))) as video:
        assert (video.width, video.height) == (WIDE, 64) and video.read_all()[0].shape == (
            4,
            64,
            WIDE,
            3,
        )


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p"])
def test_black_and_white_keep_their_range(tmp_path: Path, pix_fmt: str) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDE, TALL, pix_fmt
        for i in (0, 255):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(i)), format="rgb24")
                )
            )
        container.mux(stream.encode(None))
    with Video(str(tmp_path / "a.mp4")) as video:
        for side in (None, 16):
            frames, _ = video.read_all(side)
            assert frames[0].max() <= 3 and frames[1].min() >= 252


def test_raw_file_is_lossless() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), np.uint8)
    with Video(raw_file(frames, 10.0)) as video:
        again, times = video.read_all()
    np.testing.assert_array_equal(again, frames)
    np.testing.assert_allclose(times, np.arange(5) / 10, atol=1e-6)


def test_pictures_from_the_bottom_up(tmp_path: Path) -> None:
    picture = scene(np.random.default_rng(0))
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "bgr24"
        container.mux(
            stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[..., ::-1]), format="bgr24")
            )
        )
        container.mux(stream.encode(None))
    with Video(str(tmp_path / "a.avi")) as video:
        np.testing.assert_array_equal(video.read_all()[0][0], picture)
        part = video.regions_at([0.0], Region((0, 0, 1, 1), 32))[0][0]
    assert abs(coarse(part) - coarse(crop_resize(picture[None], (0, 0, 160, 96), 32)[0])).mean() < 2


def test_pictures_are_no_film_but_animations_are(tmp_path: Path) -> None:
    images = [Image.fromarray(numbered(i)) for i in (5, 6, 7)]
    for suffix in ("png", "jpg", "bmp", "webp", "tiff"):
        images[0].save(tmp_path / f"a.{suffix}")
        (tmp_path / f"a.{suffix}").rename(tmp_path / "a.mp4")
        with pytest.raises(Unreadable, match="^only a picture$"):
            Video(str(tmp_path / "a.mp4"))
    images[0].save(
        tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 300, 100]
    )
    with Video(str(tmp_path / "a.gif")) as video:
        assert numbers(video.frames_at([0.05, 0.35, 0.45])[0]) == [5, 6, 7]


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_frames_with_exif(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = (1, 6, 3, 8)[turn]  # what a camera writes that was turned so often
    file = io.BytesIO()
    Image.fromarray(numbered(5)).save(file, "jpeg", exif=exif, quality=95)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDE, TALL, "yuvj420p"
        packet = av.Packet(file.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, RATE)
        container.mux(packet)
    with Video(str(tmp_path / "a.avi")) as video:
        assert numbers(np.rot90(video.read_all()[0], turn, axes=(1, 2))) == [5]


def sound(path: Path, *, cover: bool = False) -> Path:
    """A second of silence, with a picture for its cover where asked for."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        if cover:
            art = container.add_stream("png", rate=1)
            art.width, art.height, art.pix_fmt = 16, 16, "rgb24"
            art.disposition = av.stream.Disposition.attached_pic
            picture = np.full((16, 16, 3), 9, np.uint8)
            container.mux(art.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def index_first(path: Path) -> bytes:
    """A film whose index stands before its frames, as those of the web."""
    plain = write(path)
    with (
        av.open(str(plain)) as source,
        av.open(str(path.with_name("fast.mp4")), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return path.with_name("fast.mp4").read_bytes()


def test_reasons(tmp_path: Path) -> None:
    film = write(tmp_path / "whole.mp4").read_bytes()
    early, wild = (
        index_first(tmp_path / "early.mp4"),
        np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes(),
    )
    mkv, avi, ts = (
        write(tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("mkv", "avi", "ts")
    )
    first, index, foreign = film.index(b"mdat") + 4, film.index(b"moov") - 4, "not a media file"
    contents = {
        "empty": (b"", "empty file"),
        "text": (b"not a video\n" * 100, foreign),
        "noise": (wild, foreign),
        "xml": (b"<?xml version='1.0'?><a></a>", foreign),
        "page": (b"<!DOCTYPE html><html>404</html>", foreign),
        "zeros": (bytes(1000), foreign),
        "archive": (b"PK\x03\x04" + bytes(500), foreign),
        "headless": (
            film[: len(film) // 2],
            "truncated: its index is missing",
        ),  # it stands at the end of an mp4
        "beginning": (film[:30], "truncated: its index is missing"),
        "half an index": (early[: early.index(b"mdat") // 2], "truncated: it ends in its header"),
        "no frame": (
            early[: early.index(b"mdat") + 4],
            "truncated: it ends before its first frame",
        ),
        "mkv's header": (mkv[:400], "truncated: it ends in its header"),
        "mkv without a frame": (mkv[:600], "truncated: it ends before its first frame"),
        "avi's header": (avi[:400], "truncated: it ends in its header"),
        "ts's header": (ts[:400], "truncated: "),
        "no picture": (film[:first] + bytes(index - first) + film[index:], "damaged: Invalid data"),
        "empty index": (film.replace(b"stco", b"none"), "damaged: its index names no frame"),
        "sound": (sound(tmp_path / "sound.mp4").read_bytes(), "no video stream"),
        "cover": (sound(tmp_path / "cover.mp4", cover=True).read_bytes(), "only a picture"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / "a.mp4").write_bytes(content)
        for source in (str(tmp_path / "a.mp4"), content):
            with pytest.raises(Unreadable) as caught:
                Video(source)
            assert caught.value.reason.startswith(reason), (name, caught.value.reason)
            # from a worker to the loop
            assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    for path, reason in ((tmp_path, "a folder"), (tmp_path / "none.mp4", "missing")):
        with pytest.raises(Unreadable, match=f"^{reason}"):
            Video(str(path))


def test_an_encrypted_file_is_called_so(tmp_path: Path) -> None:
    lock = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "00112233445566778899aabbccddeeff",
        "encryption_kid": "ffeeddccbbaa99887766554433221100",
    }
    with av.open(str(tmp_path / "a.mp4"), "w", options=lock) as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDE, TALL, "yuv420p"
        for i in range(20):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(i)), format="rgb24")
                )
            )
        container.mux(stream.encode(None))
    with pytest.raises(Unreadable, match="^encrypted$"):
        Video(str(tmp_path / "a.mp4"))


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_a_file_that_breaks_off_gives_what_it_has(tmp_path: Path, suffix: str) -> None:
    whole = write(tmp_path / f"a.{suffix}").read_bytes()
    with Video(whole[: int(len(whole) * 0.6)]) as video:
        got = numbers(video.read_all()[0])
        assert 60 < len(got) < 180 and got[:50] == list(range(50))
        assert numbers(video.frames_at([1.0, 1e6])[0]) == [25, got[-1]]


def test_damage_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "a.mkv").read_bytes())
    middle = slice(len(whole) // 2, len(whole) // 2 + 200)
    whole[middle] = np.random.default_rng(0).integers(0, 256, 200, np.uint8).tobytes()
    with Video(bytes(whole)) as video:
        got = numbers(video.read_all()[0])
    assert got[0] == 0 and got[-1] == 199 and len(got) > 100


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 9, np.uint8), format="rgb24")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream("libx264", rate=RATE)
        film.width, film.height, film.pix_fmt = WIDE, TALL, "yuv420p"
        container.mux(cover.encode(picture))
        for i in range(5):
            container.mux(
                film.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(i)), format="rgb24")
                )
            )
        container.mux(film.encode(None))
    with Video(str(tmp_path / "a.mp4")) as video:
        assert numbers(video.read_all()[0]) == [0, 1, 2, 3, 4]


def test_a_long_film_that_cannot_be_sought_in_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, plain = threading.Event(), Video._convert

    def slow(self: Video, *more: object) -> np.ndarray:
        never.wait()
        return plain(self, *more)

    monkeypatch.setattr(Video, "_convert", slow)
    reasons = []
    for suffix in ("avi", "mp4"):
        path, slow = str(write(tmp_path / f"a.{suffix}")), []
        with pytest.raises(Unreadable) as caught:
            timeout.run_with_timeout(
                0.3, lambda p=path, s=slow: Video(p, s).frames_at([7.0]), path, slow
            )
        reasons.append(caught.value.reason)
    never.set()
    assert reasons == [
        "not decoded after 0.3 s: avi files can only be read from their start, so convert it to "
        "mp4 or raise "
        "config.data.decode_timeout_seconds",
        "not decoded after 0.3 s",
    ]


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b.mp4", count=3).rename(tmp_path / "http:b.mp4")
    monkeypatch.chdir(tmp_path)
    with Video("http:b.mp4") as video:
        assert numbers(video.read_all()[0]) == [0, 1, 2]


def odd_files() -> list[dict[str, str]]:
    """What FFmpeg's own program shows of each odd file (make_odd_files.py)."""
    return list(csv.DictReader(make_odd_files.TABLE.read_text().splitlines()))


def test_the_table_of_odd_files_is_whole() -> None:
    rows = odd_files()
    assert (
        len(rows) == 78
        and tuple(rows[0]) == make_odd_files.COLUMNS
        and sum(row["frames"] != "0" for row in rows) == 68
    )


@pytest.mark.skipif(not make_odd_files.FILES.exists(), reason="shared/data/odd-files is absent")
@pytest.mark.parametrize("row", odd_files(), ids=lambda row: row["file"])
def test_odd_files(row: dict[str, str]) -> None:
    path = str(make_odd_files.FILES / row["file"])
    if row["frames"] == "0":
        with pytest.raises(Unreadable):
            Video(path)
        return
    with Video(path) as video:
        assert video.duration > 0 and video.fps > 0
        assert len(video.frames_at([0.0, min(video.duration / 2, 1.0)], 32)[0]) == 2
        assert (
            abs(video.width - int(row["width"])) <= 1
            and abs(video.height - int(row["height"])) <= 1
        ), "ours are even"
        assert len(video.read_all(2)[0]) == int(row["frames"])
        (part,), (first,) = (
            video.regions_at([0.0], Region((0, 0, 1, 1), 32))[0],
            video.frames_at([0.0])[0],
        )
        same = np.asarray(
            Image.fromarray(np.ascontiguousarray(first)).resize((32, 32), Image.Resampling.BOX)
        )
        assert abs(coarse(part) - coarse(same)).mean() < 4, (
            "of 255: the same colours, whatever they are stored as"
        )


def test_a_damaged_file_is_read_as_far_as_a_plain_loop_reads_it_or_named() -> None:
    files = fuzz_media.samples()
    small = sorted(fuzz_media.odd_files().items(), key=lambda file: len(file[1]))
    places = [(name, file, 10) for name, file in files.items()]
    places += [(name, file, 2) for name, file in small[:20]]
    cases = (case for args in places for case in fuzz_media.damaged(*args))
    found = [(case.name, *outcome) for case, outcome in fuzz_media.outcomes(cases)]
    assert not [case for case in found if case[1] not in ("read", "named")]
    assert {kind for _, kind, _ in found} == {"read", "named"}
    # what a child dies of is seen, and the next case is read
    deadly = [fuzz_media.Case("deadly", fuzz_media.DEADLY), fuzz_media.Case("empty", b"")]
    assert [o.kind for _, o in fuzz_media.outcomes(deadly)] == ["crash", "named"]


@pytest.mark.skipif(not (SHARED / "jhmdb21").exists(), reason="shared/data/jhmdb21 is absent")
def test_counts_of_real_clips() -> None:
    with open(SHARED / "jhmdb21" / "clips.csv") as file:
        rows = list(csv.DictReader(file))[::250]
    for row in rows:
        with Video(str(SHARED / "jhmdb21" / row["path"])) as video:
            frames, _ = video.read_all(64)
            assert len(frames) == int(row["mask_frames"]) == round(video.duration * video.fps)
