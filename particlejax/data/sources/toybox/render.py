# SPDX-License-Identifier: Apache-2.0
"""Draws toy clips: a pure function from (seed, split, index) to frames, sound and the truth about
them.

Legend: T 24 frames, H and W 64 pixels. Positions are (row, col) in pixels, times in seconds,
colours RGB in [0, 1]. Everything is drawn for all T at once; edges are soft over one pixel of
signed distance.
"""

import dataclasses

import numpy as np

from particlejax.data.sources.toybox import actions, sound
from particlejax.data.sources.toybox.actions import ACTIONS, FRAME_TIMES, SIZE, Play, Pose

PAD = 4  # pixels of world around the frame: what the shaking camera (2 pixels at most) may see
RADII = (5.5, 9.5)  # pixels, of actors and bystanders alike
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered", "dotted", "graded")
COLORS = dict(
    red=(0.9, 0.15, 0.15),
    orange=(1.0, 0.55, 0.1),
    yellow=(0.95, 0.9, 0.2),
    green=(0.2, 0.8, 0.25),
    cyan=(0.2, 0.85, 0.9),
    blue=(0.3, 0.45, 1.0),
    purple=(0.65, 0.3, 0.95),
    white=(0.95, 0.95, 0.95),
)
VERBS = dict(
    slide=("slides along in a straight line", "moves straight on"),
    bounce=("bounces on the floor", "hops up and down"),
    spin=("spins in place", "turns round and round"),
    grow=("grows", "becomes larger"),
    shrink=("shrinks", "becomes smaller"),
    orbit=("goes round in a circle", "orbits a point"),
    shake=("shakes", "vibrates fast"),
    collide=("collides with another object", "bumps into something and recoils"),
    drop=("drops to the floor", "falls down and stays there"),
    swing=("swings like a pendulum", "swings to and fro"),
    zigzag=("moves in a zigzag", "zigzags along"),
    split=("splits in two", "comes apart into two pieces"),
)
TEMPLATES = (
    "the {look} {verb}",
    "watch the {look}: it {verb}",
    "in this clip the {look} {verb}",
    "amid some clutter the {look} {verb}",
    "one thing happens: the {look} {verb}",
)


@dataclasses.dataclass(frozen=True)
class Appearance:
    """How an object looks: radius in pixels, tilt in radians; back is the texture's second
    colour.
    """

    shape: str
    texture: str
    color: str
    front: np.ndarray
    back: np.ndarray
    radius: float
    tilt: float

    @property
    def description(self) -> str:
        """Colour, texture and shape, for a caption."""
        return f"{self.color} {self.texture} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip and its truth; tracks hold centre row, centre col, height, width as fractions of the
    frame.
    """

    frames: np.ndarray  # uint8 [T, H, W, 3]
    audio: np.ndarray  # float32 [32000], 16 kHz, within (-1, 1)
    label: int
    caption: str
    tracks: np.ndarray  # float32 [objects, T, 4], the actor first, camera shake included
    contacts: np.ndarray  # float32 [contacts], seconds
    moment: float  # seconds
    abnormal_time: float  # seconds, -1 if all is normal
    name: str


def draw_appearance(rng: np.random.Generator, radius: float) -> Appearance:
    """One object out of the one distribution of looks that actors and bystanders share."""
    shape, texture = str(rng.choice(SHAPES)), str(rng.choice(TEXTURES))
    if shape in ("disc", "ring") and texture == "plain":
        # a plain disc hides its turning, and were it only spinners that lack it, that would tell
        texture = "striped"
    color = str(rng.choice(list(COLORS)))
    front = np.clip(np.array(COLORS[color]) + rng.uniform(-0.06, 0.06, 3), 0, 1)
    back = front * 0.3 if color == "white" or rng.random() < 0.5 else 0.35 * front + 0.65
    return Appearance(shape, texture, color, front, back, radius, rng.uniform(0, 2 * np.pi))


def _hull(shape: str) -> np.ndarray:
    # corners float [corners, 2] of an outline around the unit shape, for boxes
    def ngon(n: int, radius: float) -> np.ndarray:
        angles = 2 * np.pi * np.arange(n) / n
        return radius * np.stack([np.sin(angles), np.cos(angles)], -1)

    cross = np.array([[a * 0.98, b * 0.36] for a in (-1, 1) for b in (-1, 1)])
    return {
        "disc": ngon(48, 0.92),
        "ring": ngon(48, 0.98),
        "triangle": ngon(3, 1.1),
        "star": ngon(5, 1.1),
        "square": ngon(4, 0.8 * 2**0.5) @ np.array([[1, 1], [-1, 1]]) / 2**0.5,
        "cross": np.concatenate([cross, cross[:, ::-1]]),
    }[shape]


HULLS = {shape: _hull(shape) for shape in SHAPES}


def _distance(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    # signed distance from the outline of the unit shape, negative inside
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - 0.98, y - 0.36), np.maximum(x - 0.36, y - 0.98))
    radius = np.sqrt(x * x + y * y)
    if shape == "disc":
        return radius - 0.92
    if shape == "ring":
        return np.abs(radius - 0.72) - 0.26
    sector = 2 * np.pi / (3 if shape == "triangle" else 5)
    # 0 at a corner, sector / 2 between two
    angle = np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2)
    if shape == "triangle":
        return radius * np.cos(sector / 2 - angle) - 0.55
    # the edge from the corner (1.1, 0) to the notch at radius 0.5, as a half plane
    notch = 0.5 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1], 1.1 - notch[0]]) / np.hypot(notch[1], 1.1 - notch[0])
    return radius * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) - 1.1 * normal[0]


def _texture(texture: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    # how much of the second colour there is, in [0, 1]; coordinates in units of the radius
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "graded":
        return np.clip(0.5 + 0.6 * x, 0, 1)
    wave = {
        "striped": lambda: np.sin(7.5 * x),
        "checkered": lambda: 1.6 * np.sin(5 * x) * np.sin(5 * y),
        "dotted": lambda: 2 * np.cos(6 * x) * np.cos(6 * y) - 0.9,
    }[texture]()
    return np.clip(0.5 + 1.5 * wave, 0, 1)


def paint(
    canvas: np.ndarray,
    appearance: Appearance,
    centers: np.ndarray,
    scale: np.ndarray,
    angle: np.ndarray,
) -> None:
    """Paints an object into canvas float32 [T, H, W, 3]; centres float [T, 2] pixels, scale and
    angle float [T].
    """
    radius = (appearance.radius * scale).astype(np.float32)[:, None, None]
    reach = 1.15 * radius.max() + 2
    top, left = np.maximum(np.floor(centers.min(0) - reach), 0).astype(int)
    bottom, right = np.maximum(np.ceil(centers.max(0) + reach), 0).astype(int)
    window = canvas[:, top:bottom, left:right]  # only where the object ever is
    h, w = window.shape[1:3]
    y = (np.arange(top, top + h, dtype=np.float32)[:, None] + 0.5 - centers[:, :1, None]).astype(
        np.float32
    )
    x = (np.arange(left, left + w, dtype=np.float32) + 0.5 - centers[:, 1:, None]).astype(
        np.float32
    )
    rotation = (appearance.tilt + angle).astype(np.float32)[:, None, None]
    u, v = (
        (np.cos(rotation) * y - np.sin(rotation) * x) / radius,
        (np.sin(rotation) * y + np.cos(rotation) * x) / radius,
    )
    distance = _distance(appearance.shape, u, v) * radius  # pixels
    texture_weight = _texture(appearance.texture, u, v)[..., None]
    color = (
        appearance.front.astype(np.float32) * (1 - texture_weight)
        + appearance.back.astype(np.float32) * texture_weight
    )
    # a dark rim keeps it apart from any background
    color *= 1 - 0.75 * np.clip(distance + 1.6, 0, 1)[..., None]
    window += np.clip(0.5 - distance, 0, 1)[..., None] * (color - window)


def boxes(
    appearance: Appearance, centers: np.ndarray, scale: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    """Exact boxes of an object, float [T, 4]: centre row, centre col, height, width in pixels."""
    rotation = appearance.tilt + angle
    cos, sin = np.cos(rotation), np.sin(rotation)
    # paint maps a pixel offset to the unit shape by a rotation; this is its inverse
    inverse = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    corners = (
        np.einsum("tij,cj->tci", inverse, HULLS[appearance.shape])
        * (appearance.radius * scale)[:, None, None]
    )
    low, high = corners.min(1), corners.max(1)
    return np.concatenate([centers + (low + high) / 2, high - low], -1)


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    # smooth noise float32 [size, size] in [-1, 1]: a coarse grid, interpolated
    positions = np.linspace(0, cells - 1, size)
    weights = np.maximum(1 - np.abs(positions[:, None] - np.arange(cells)), 0).astype(np.float32)
    return weights @ rng.uniform(-1, 1, (cells, cells)).astype(np.float32) @ weights.T


def _muted_color(rng: np.random.Generator) -> np.ndarray:
    return (rng.uniform(0.12, 0.5) + rng.uniform(-0.1, 0.1, 3)).astype(np.float32)


def background(rng: np.random.Generator, floor: float) -> np.ndarray:
    """A cluttered world, float32 [72, 72, 3]: smooth noise, blobs and lines, half the time a line
    at the floor row.
    """
    size = SIZE + 2 * PAD
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    noise = 0.1 * _smooth_noise(rng, 6, size) + 0.06 * _smooth_noise(rng, 16, size)
    world = _muted_color(rng) + noise[..., None] * rng.uniform(0.5, 1.0, 3).astype(np.float32)
    for _ in range(rng.integers(4, 9)):
        (row, col), (height, width) = rng.uniform(0, size, 2), rng.uniform(2, 8, 2)
        blob = np.clip(1.5 * (1 - ((y - row) / height) ** 2 - ((x - col) / width) ** 2), 0, 1)[
            ..., None
        ]
        world += blob * (_muted_color(rng) - world)
    for _ in range(rng.integers(2, 5)):
        angle, distance = rng.uniform(0, np.pi), rng.uniform(-size / 2, size / 2)
        line = (
            (y - size / 2) * np.float32(np.sin(angle))
            + (x - size / 2) * np.float32(np.cos(angle))
            - np.float32(distance)
        )
        world += np.clip(1.4 - np.abs(line), 0, 1)[..., None] * 0.7 * (_muted_color(rng) - world)
    if rng.random() < 0.5:
        world += np.clip(1.6 - np.abs(y - floor - PAD - 0.8), 0, 1)[..., None] * (0.6 - world)
    return world


def _camera_shake(rng: np.random.Generator) -> np.ndarray:
    # smooth shifts float [T, 2] of everything, at most 2 pixels
    rate, phase = rng.uniform(0.3, 1.0, (2, 1, 2)), rng.uniform(0, 2 * np.pi, (2, 1, 2))
    waves = np.sin(2 * np.pi * rate * FRAME_TIMES[:, None] + phase)
    return rng.uniform(0, 2) * waves.mean(0)


def _view_world(world: np.ndarray, camera: np.ndarray) -> np.ndarray:
    # what the camera [T, 2] sees of the world [72, 72, 3]: float32 [T, 64, 64, 3], bilinear
    start = PAD - camera
    integer_offset = np.floor(start).astype(int)
    fraction = (start - integer_offset).astype(np.float32)[:, :, None, None, None]
    frames = np.empty((len(camera), SIZE, SIZE, 3), np.float32)
    for t, (row, col) in enumerate(integer_offset):
        rows = (
            world[row : row + SIZE] * (1 - fraction[t, 0, 0])
            + world[row + 1 : row + 1 + SIZE] * fraction[t, 0, 0]
        )
        frames[t] = (
            rows[:, col : col + SIZE] * (1 - fraction[t, 1, 0])
            + rows[:, col + 1 : col + 1 + SIZE] * fraction[t, 1, 0]
        )
    return frames


def _bystanders(
    rng: np.random.Generator, actor: Appearance, pose: Pose, count: int
) -> list[tuple[Appearance, np.ndarray]]:
    # looks and fixed centres; each takes the freest of eight places so that the clutter does not
    # hide the play
    occupied, bystanders = pose.centers.reshape(-1, 2), []
    for _ in range(count):
        appearance = draw_appearance(rng, rng.uniform(*RADII))
        if rng.random() < 0.25:  # a double: two equal objects in one frame need not have split
            appearance = dataclasses.replace(
                actor, radius=actor.radius * pose.scale[0], tilt=rng.uniform(0, 2 * np.pi)
            )
        candidates = rng.uniform(6, SIZE - 6, (8, 2))
        position = candidates[
            np.linalg.norm(candidates[:, None] - occupied, axis=-1).min(1).argmax()
        ]
        occupied = np.concatenate([occupied, position[None]])
        bystanders.append((appearance, position))
    return bystanders


def _after_quirk(rng: np.random.Generator, appearance: Appearance, quirk: str | None) -> Appearance:
    # what the object looks like after the quirk
    if quirk == "texture":
        texture = rng.choice([t for t in TEXTURES if t not in (appearance.texture, "plain")])
        return dataclasses.replace(appearance, texture=str(texture))
    if quirk == "colour":
        return dataclasses.replace(
            appearance, front=1 - 0.9 * appearance.front, back=1 - appearance.back
        )
    return appearance


def _paint_actors(
    rng: np.random.Generator,
    frames: np.ndarray,
    appearances: list[Appearance],
    play: Play,
    pose: Pose,
) -> None:
    # paints the acting bodies, as they look before and after a quirk
    split = int(np.searchsorted(FRAME_TIMES, play.quirk_time))
    for appearance, centers in zip(appearances, pose.centers, strict=False):  # one body or two
        changed = _after_quirk(rng, appearance, play.quirk)
        for frame_range, visible_appearance in (
            (slice(None, split), appearance),
            (slice(split, None), changed),
        ):
            if len(centers[frame_range]):
                paint(
                    frames[frame_range],
                    visible_appearance,
                    centers[frame_range],
                    pose.scale[frame_range],
                    pose.angle[frame_range],
                )


def render(seed: int, split_id: int, index: int, split: str = "", omit: str = "") -> Clip:
    """Example `index` of a split, a pure function of its arguments; the label is index % 12.

    omit: 'sight' leaves out who acts, so that the sound alone tells what is done, 'sound' all
    but the room's noise.
    """
    rng = np.random.default_rng([seed, split_id, index])
    action = ACTIONS[index % len(ACTIONS)]
    actor, second = (draw_appearance(rng, rng.uniform(*RADII)) for _ in range(2))
    play = actions.play(rng, action, np.array([actor.radius, second.radius]))
    pose = play.pose_at(FRAME_TIMES)
    camera = _camera_shake(rng)
    shaken_pose = dataclasses.replace(pose, centers=pose.centers + camera)
    actor_visible = omit != "sight"
    # the struck body of a collision is one of the bystanders that every action has
    bystanders = _bystanders(
        rng, actor, pose, rng.integers(1, 4) - (actor_visible and action == "collide")
    )
    foot_box = boxes(actor, play.offset[None], np.ones(1), np.zeros(1))[0]
    floor = (
        foot_box[0] + foot_box[2] / 2
        if actor_visible and play.motion.on_floor
        else rng.uniform(SIZE / 2, SIZE)
    )
    world = background(rng, floor)[None]
    at_rest = np.ones(1), np.zeros(1)
    for appearance, position in bystanders:
        paint(world, appearance, position[None] + PAD, *at_rest)
    frames = _view_world(world[0], camera)
    appearances = [actor, second if action == "collide" else actor]
    if actor_visible:
        _paint_actors(rng, frames, appearances, play, shaken_pose)
    tracks = [
        boxes(appearance, centers, pose.scale, pose.angle)
        for appearance, centers in zip(appearances, shaken_pose.centers, strict=False)
    ]
    tracks += [
        boxes(appearance, position + camera, np.ones(len(camera)), np.zeros(len(camera)))
        for appearance, position in bystanders
    ]
    caption = str(rng.choice(TEMPLATES)).format(
        look=actor.description, verb=rng.choice(VERBS[action])
    )
    return Clip(
        frames=np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8),
        audio=sound.synthesize(
            rng, None if omit == "sound" else play, actor.radius, TEXTURES.index(actor.texture)
        ),
        label=ACTIONS.index(action),
        caption=caption,
        tracks=(np.stack(tracks) / SIZE).astype(np.float32),
        contacts=play.contacts,
        moment=float(play.moment),
        abnormal_time=play.quirk_time if play.quirk else -1.0,
        name=f"{split or split_id}/{index:05d}",
    )
