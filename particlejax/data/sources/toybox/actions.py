# SPDX-License-Identifier: Apache-2.0
"""What the actor of a toy clip does: twelve motions as functions of time, and how one is put into
the frame.

Legend: N bodies (1, or 2 for collide and split), T times. Positions are (row, col) in pixels, times
in seconds. No motion knows left from right, so a horizontal flip never changes a label.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

SECONDS, FPS, SIZE = 2.0, 12, 64  # 24 frames of 64 x 64 pixels
FRAME_TIMES = np.arange(int(SECONDS * FPS)) / FPS
QUIRKS = ("teleport", "freeze", "colour", "texture")
QUIRK_RATE = 0.15  # share of clips in which something abnormal happens
# seconds for which a frozen actor stands still; every moment below is <= 1.5 s, so it still fits
FREEZE = 0.3
MARGIN = (
    2.0  # pixels between an actor and the edge of the frame, which is what the camera may shake
)


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where the bodies are: centres float [N, T, 2] (pixels), scale and angle float [T] (factor,
    radians).
    """

    centers: np.ndarray
    scale: np.ndarray
    angle: np.ndarray


@dataclasses.dataclass(frozen=True)
class Motion:
    """One drawn motion: `pose_at` gives its pose (around any origin) at times [T].

    moment: the key time of the action, None when it depends on the frame (slide: nearest to the
    middle). visible_time: a time at which standing still would be seen, None when any would do.
    floored: origin stands on a floor.
    """

    pose_at: Callable[[np.ndarray], Pose]
    moment: float | None
    contacts: tuple[float, ...] = ()
    visible_time: float | None = None
    on_floor: bool = False


def _pose(
    *centers: np.ndarray, scale: np.ndarray | float = 1.0, angle: np.ndarray | float = 0.0
) -> Pose:
    stacked_centers = np.stack(centers)
    t = stacked_centers.shape[1]
    return Pose(stacked_centers, np.broadcast_to(scale, (t,)), np.broadcast_to(angle, (t,)))


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.sin(angle), np.cos(angle)])


def _sign(rng: np.random.Generator) -> float:
    return float(rng.choice([-1.0, 1.0]))


def _at_rest(t: np.ndarray) -> np.ndarray:
    return np.zeros((len(t), 2))


def slide(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """A straight line at constant speed."""
    del radii
    displacement = rng.uniform(24, 36) * _direction(rng)  # pixels in the whole clip
    return Motion(lambda t: _pose(np.outer(t / SECONDS, displacement)), None)


def bounce(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Parabolas over a floor, one after the other; every touch of the floor is a contact.

    The moment is the first touch after 0.15 s.
    """
    del radii
    period, height, drift = rng.uniform(0.5, 0.8), rng.uniform(14, 22), rng.uniform(-6, 6)
    first = rng.uniform(0.15, 0.65)

    def pose_at(t: np.ndarray) -> Pose:
        u = (t - first) / period % 1
        return _pose(np.stack([-4 * height * u * (1 - u), drift * t], -1))

    earliest = first - period if first > period else first
    return Motion(pose_at, first, tuple(np.arange(earliest, SECONDS, period)), on_floor=True)


def spin(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Turns in place, now slower now faster; the moment is when it turns fastest."""
    del radii
    # at most 30 degrees a frame: no aliasing
    rate, moment = (_sign(rng) * rng.uniform(2.4, 3.9), rng.uniform(0.4, 1.5))
    return Motion(
        lambda t: _pose(_at_rest(t), angle=rate * (t + 0.6 / np.pi * np.sin(np.pi * (t - moment)))),
        moment,
    )


def _resize(rng: np.random.Generator, radius: float, direction: int) -> Motion:
    # between 5 and 10.5 pixels whichever way: the sizes of all other actors, so one frame tells
    # nothing
    low, high, moment = rng.uniform(4.6, 5.4), rng.uniform(9.8, 11.2), rng.uniform(0.5, 1.4)

    def pose_at(t: np.ndarray) -> Pose:
        progress = 1 / (1 + np.exp(-direction * (t - moment) / 0.18))
        return _pose(_at_rest(t), scale=low * (high / low) ** progress / radius)

    return Motion(pose_at, moment, visible_time=moment)


def grow(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Swells to about twice its radius; the moment is when it grows fastest."""
    return _resize(rng, radii[0], +1)


def shrink(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Grow, backwards."""
    return _resize(rng, radii[0], -1)


def orbit(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Goes round a circle; the moment is its first passage of the highest point."""
    del radii
    radius, speed, direction = rng.uniform(10, 14), rng.uniform(4.2, 5.5), _sign(rng)
    moment = rng.uniform(0.05, 2 * np.pi / speed)

    def pose_at(t: np.ndarray) -> Pose:
        angle = speed * (t - moment)
        return _pose(radius * np.stack([-np.cos(angle), direction * np.sin(angle)], -1))

    return Motion(pose_at, moment)


def shake(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Vibrates fast along one axis, strongest at the moment."""
    del radii
    axis, width, moment = _direction(rng), rng.uniform(3.5, 5), rng.uniform(0.4, 1.5)
    # hertz, safely below the 6 of 12 frames a second
    rate, phase = (rng.uniform(3.0, 4.2), rng.uniform(0, 2 * np.pi))

    def pose_at(t: np.ndarray) -> Pose:
        amplitude = width * (0.45 + 0.55 * np.exp(-(((t - moment) / 0.4) ** 2)))
        return _pose(np.outer(amplitude * np.sin(2 * np.pi * rate * t + phase), axis))

    return Motion(pose_at, moment)


def collide(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Runs into a second body at rest; both recoil and are braked."""
    axis, hit, travel = _direction(rng), rng.uniform(0.6, 1.3), rng.uniform(5, 8)
    # outlines are not all discs: overlap a little rather than recoil from nothing
    gap = 0.85 * radii.sum()
    approach = min(rng.uniform(15, 22), SIZE - 2 * MARGIN - radii.sum() - gap - travel)

    def pose_at(t: np.ndarray) -> Pose:
        after = 1 - np.exp(-np.maximum(t - hit, 0) / 0.4)
        return _pose(
            np.outer(np.minimum(t / hit - 1, 0) * approach - 0.8 * travel * after, axis),
            np.outer(gap + travel * after, axis),
        )

    return Motion(pose_at, hit, (hit,), visible_time=hit - 0.15)


def drop(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Hangs, falls with gravity, hits the floor and stays there."""
    del radii
    start, fall, height = rng.uniform(0.1, 0.6), rng.uniform(0.45, 0.6), rng.uniform(20, 32)
    drift = rng.uniform(-8, 8)  # pixels moved sideways during the fall

    def pose_at(t: np.ndarray) -> Pose:
        u = np.clip((t - start) / fall, 0, 1)
        return _pose(np.stack([height * (u**2 - 1), drift * u], -1))

    return Motion(
        pose_at, start + fall, (start + fall,), visible_time=start + 0.7 * fall, on_floor=True
    )


def swing(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """A pendulum; the moment is its first passage of the lowest point, where it is fastest."""
    del radii
    rope, width, period = (
        rng.uniform(16, 24),
        _sign(rng) * rng.uniform(0.6, 1.0),
        rng.uniform(1.1, 1.7),
    )
    moment = rng.uniform(0.05, period / 2)

    def pose_at(t: np.ndarray) -> Pose:
        lean = width * np.sin(2 * np.pi * (t - moment) / period)
        return _pose(rope * np.stack([np.cos(lean), np.sin(lean)], -1), angle=-lean)

    return Motion(pose_at, moment)


def zigzag(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Goes steadily on while a triangular wave carries it from side to side; the moment is its
    first turn.
    """
    del radii
    heading, width, period = _direction(rng), rng.uniform(6, 9), rng.uniform(0.6, 0.9)
    distance, moment, direction = rng.uniform(20, 30), rng.uniform(0.05, period / 2), _sign(rng)

    def pose_at(t: np.ndarray) -> Pose:
        side = direction * width * (4 * np.abs((t - moment) / period % 1 - 0.5) - 1)
        return _pose(
            np.outer(distance * t / SECONDS, heading) + np.outer(side, heading[::-1] * [1, -1])
        )

    return Motion(pose_at, moment)


def split(rng: np.random.Generator, radii: np.ndarray) -> Motion:
    """Drifts as one, then comes apart into two equal bodies with a click."""
    del radii
    axis, drift, separation = (
        _direction(rng),
        rng.uniform(3, 6) * _direction(rng),
        rng.uniform(11, 15),
    )
    split_time = rng.uniform(0.5, 1.4)

    def pose_at(t: np.ndarray) -> Pose:
        offset = np.outer(separation * (1 - np.exp(-np.maximum(t - split_time, 0) / 0.35)), axis)
        return _pose(np.outer(t, drift) + offset, np.outer(t, drift) - offset)

    return Motion(pose_at, split_time, (split_time,), visible_time=split_time + 0.1)


MOTIONS = dict(
    slide=slide,
    bounce=bounce,
    spin=spin,
    grow=grow,
    shrink=shrink,
    orbit=orbit,
    shake=shake,
    collide=collide,
    drop=drop,
    swing=swing,
    zigzag=zigzag,
    split=split,
)
ACTIONS = tuple(MOTIONS)  # the order is the label


@dataclasses.dataclass(frozen=True)
class Play:
    """A motion in the frame: offset and jump float [2] in pixels; quirk is None when nothing
    abnormal happens.
    """

    motion: Motion
    offset: np.ndarray
    jump: np.ndarray
    quirk: str | None
    quirk_time: float  # seconds, of the quirk

    def pose_at(self, times: np.ndarray) -> Pose:
        """The pose at times [T] of the clip, in pixels of the frame (before the camera shakes)."""
        motion_times = (
            np.minimum(times, np.maximum(self.quirk_time, times - FREEZE))
            if self.quirk == "freeze"
            else times
        )
        pose = self.motion.pose_at(motion_times)
        offset = self.offset + np.outer(times >= self.quirk_time, self.jump)
        return dataclasses.replace(pose, centers=pose.centers + offset)

    def clip_time(self, time: float) -> float:
        """When in the clip the motion's own time comes."""
        return time + FREEZE if self.quirk == "freeze" and time > self.quirk_time else time

    @property
    def contacts(self) -> np.ndarray:
        """Seconds of the contacts that fall into the clip, float32 [contacts]."""
        times = np.array([self.clip_time(time) for time in self.motion.contacts], np.float32)
        return times[times < SECONDS]

    @property
    def moment(self) -> float:
        """Seconds of the action's key moment."""
        if self.motion.moment is not None:
            return self.clip_time(self.motion.moment)
        times = np.linspace(0, SECONDS, 201)[:-1]
        return float(times[np.square(self.pose_at(times).centers[0] - SIZE / 2).sum(-1).argmin()])


def play(rng: np.random.Generator, action: str, radii: np.ndarray) -> Play:
    """Draws a motion for bodies of radii float [2] (pixels), a place that keeps it in the frame,
    and maybe a quirk.
    """
    motion = MOTIONS[action](rng, radii)
    pose = motion.pose_at(np.linspace(0, SECONDS, 97))
    margin = (radii[: len(pose.centers), None] * pose.scale)[..., None] + MARGIN
    low, high = -(pose.centers - margin).min((0, 1)), SIZE - (pose.centers + margin).max((0, 1))
    # too large: the middle
    low, high = (np.minimum(low, (low + high) / 2), np.maximum(high, (low + high) / 2))
    offset = rng.uniform(low, high)
    quirk, quirk_time, jump = None, SECONDS, np.zeros(2)
    if rng.random() < QUIRK_RATE:
        quirk, quirk_time = str(rng.choice(QUIRKS)), rng.uniform(0.4, 1.6)
    if quirk == "teleport":
        jumps = rng.uniform(low, high, (16, 2)) - offset
        jumps[:, 0] *= not motion.on_floor  # a floor holds its height
        jump = jumps[np.abs(jumps).sum(-1).argmax()]
    if quirk == "freeze":
        quirk_time = rng.uniform(0.4, 1.4) if motion.visible_time is None else motion.visible_time
    return Play(motion, offset, jump, quirk, float(quirk_time))
