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
COLOURS = dict(
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
class Look:
    """How an object looks: radius in pixels, tilt in radians; back is the texture's second
    colour.
    """

    shape: str
    texture: str
    colour: str
    front: np.ndarray
    back: np.ndarray
    radius: float
    tilt: float

    @property
    def words(self) -> str:
        """Colour, texture and shape, for a caption."""
        return f"{self.colour} {self.texture} {self.shape}"


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


def draw_look(rng: np.random.Generator, radius: float) -> Look:
    """One object out of the one distribution of looks that actors and bystanders share."""
    shape, texture = str(rng.choice(SHAPES)), str(rng.choice(TEXTURES))
    if shape in ("disc", "ring") and texture == "plain":
        # a plain disc hides its turning, and were it only spinners that lack it, that would tell
        texture = "striped"
    colour = str(rng.choice(list(COLOURS)))
    front = np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.06, 0.06, 3), 0, 1)
    back = front * 0.3 if colour == "white" or rng.random() < 0.5 else 0.35 * front + 0.65
    return Look(shape, texture, colour, front, back, radius, rng.uniform(0, 2 * np.pi))


def _hull(shape: str) -> np.ndarray:
    # corners float [corners, 2] of an outline around the unit shape, for boxes
    def ngon(n: int, radius: float) -> np.ndarray:
        turn = 2 * np.pi * np.arange(n) / n
        return radius * np.stack([np.sin(turn), np.cos(turn)], -1)

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
    far = np.sqrt(x * x + y * y)
    if shape == "disc":
        return far - 0.92
    if shape == "ring":
        return np.abs(far - 0.72) - 0.26
    sector = 2 * np.pi / (3 if shape == "triangle" else 5)
    # 0 at a corner, sector / 2 between two
    turn = np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2)
    if shape == "triangle":
        return far * np.cos(sector / 2 - turn) - 0.55
    # the edge from the corner (1.1, 0) to the notch at radius 0.5, as a half plane
    notch = 0.5 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    across = np.array([notch[1], 1.1 - notch[0]]) / np.hypot(notch[1], 1.1 - notch[0])
    return far * (np.cos(turn) * across[0] + np.sin(turn) * across[1]) - 1.1 * across[0]


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
    canvas: np.ndarray, look: Look, centres: np.ndarray, scale: np.ndarray, angle: np.ndarray
) -> None:
    """Paints an object into canvas float32 [T, H, W, 3]; centres float [T, 2] pixels, scale and
    angle float [T].
    """
    radius = (look.radius * scale).astype(np.float32)[:, None, None]
    reach = 1.15 * radius.max() + 2
    top, left = np.maximum(np.floor(centres.min(0) - reach), 0).astype(int)
    low, right = np.maximum(np.ceil(centres.max(0) + reach), 0).astype(int)
    window = canvas[:, top:low, left:right]  # only where the object ever is
    h, w = window.shape[1:3]
    y = (np.arange(top, top + h, dtype=np.float32)[:, None] + 0.5 - centres[:, :1, None]).astype(
        np.float32
    )
    x = (np.arange(left, left + w, dtype=np.float32) + 0.5 - centres[:, 1:, None]).astype(
        np.float32
    )
    turn = (look.tilt + angle).astype(np.float32)[:, None, None]
    u, v = (
        (np.cos(turn) * y - np.sin(turn) * x) / radius,
        (np.sin(turn) * y + np.cos(turn) * x) / radius,
    )
    distance = _distance(look.shape, u, v) * radius  # pixels
    mix = _texture(look.texture, u, v)[..., None]
    colour = look.front.astype(np.float32) * (1 - mix) + look.back.astype(np.float32) * mix
    # a dark rim keeps it apart from any background
    colour *= 1 - 0.75 * np.clip(distance + 1.6, 0, 1)[..., None]
    window += np.clip(0.5 - distance, 0, 1)[..., None] * (colour - window)


def boxes(look: Look, centres: np.ndarray, scale: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Exact boxes of an object, float [T, 4]: centre row, centre col, height, width in pixels."""
    turn = look.tilt + angle
    cos, sin = np.cos(turn), np.sin(turn)
    # paint maps a pixel offset to the unit shape by a rotation; this is its inverse
    inverse = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    corners = (
        np.einsum("tij,cj->tci", inverse, HULLS[look.shape]) * (look.radius * scale)[:, None, None]
    )
    low, high = corners.min(1), corners.max(1)
    return np.concatenate([centres + (low + high) / 2, high - low], -1)


def _smooth(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    # smooth noise float32 [size, size] in [-1, 1]: a coarse grid, interpolated
    at = np.linspace(0, cells - 1, size)
    weights = np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0).astype(np.float32)
    return weights @ rng.uniform(-1, 1, (cells, cells)).astype(np.float32) @ weights.T


def _muted(rng: np.random.Generator) -> np.ndarray:
    return (rng.uniform(0.12, 0.5) + rng.uniform(-0.1, 0.1, 3)).astype(np.float32)


def background(rng: np.random.Generator, floor: float) -> np.ndarray:
    """A cluttered world, float32 [72, 72, 3]: smooth noise, blobs and lines, half the time a line
    at the floor row.
    """
    size = SIZE + 2 * PAD
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    noise = 0.1 * _smooth(rng, 6, size) + 0.06 * _smooth(rng, 16, size)
    world = _muted(rng) + noise[..., None] * rng.uniform(0.5, 1.0, 3).astype(np.float32)
    for _ in range(rng.integers(4, 9)):
        (row, col), (high, wide) = rng.uniform(0, size, 2), rng.uniform(2, 8, 2)
        blob = np.clip(1.5 * (1 - ((y - row) / high) ** 2 - ((x - col) / wide) ** 2), 0, 1)[
            ..., None
        ]
        world += blob * (_muted(rng) - world)
    for _ in range(rng.integers(2, 5)):
        turn, away = rng.uniform(0, np.pi), rng.uniform(-size / 2, size / 2)
        line = (
            (y - size / 2) * np.float32(np.sin(turn))
            + (x - size / 2) * np.float32(np.cos(turn))
            - np.float32(away)
        )
        world += np.clip(1.4 - np.abs(line), 0, 1)[..., None] * 0.7 * (_muted(rng) - world)
    if rng.random() < 0.5:
        world += np.clip(1.6 - np.abs(y - floor - PAD - 0.8), 0, 1)[..., None] * (0.6 - world)
    return world


def _camera(rng: np.random.Generator) -> np.ndarray:
    # smooth shifts float [T, 2] of everything, at most 2 pixels
    rate, phase = rng.uniform(0.3, 1.0, (2, 1, 2)), rng.uniform(0, 2 * np.pi, (2, 1, 2))
    waves = np.sin(2 * np.pi * rate * FRAME_TIMES[:, None] + phase)
    return rng.uniform(0, 2) * waves.mean(0)


def _film(world: np.ndarray, camera: np.ndarray) -> np.ndarray:
    # what the camera [T, 2] sees of the world [72, 72, 3]: float32 [T, 64, 64, 3], bilinear
    start = PAD - camera
    whole = np.floor(start).astype(int)
    part = (start - whole).astype(np.float32)[:, :, None, None, None]
    frames = np.empty((len(camera), SIZE, SIZE, 3), np.float32)
    for t, (row, col) in enumerate(whole):
        rows = (
            world[row : row + SIZE] * (1 - part[t, 0, 0])
            + world[row + 1 : row + 1 + SIZE] * part[t, 0, 0]
        )
        frames[t] = (
            rows[:, col : col + SIZE] * (1 - part[t, 1, 0])
            + rows[:, col + 1 : col + 1 + SIZE] * part[t, 1, 0]
        )
    return frames


def _bystanders(
    rng: np.random.Generator, actor: Look, pose: Pose, count: int
) -> list[tuple[Look, np.ndarray]]:
    # looks and fixed centres; each takes the freest of eight places so that the clutter does not
    # hide the play
    taken, found = pose.centres.reshape(-1, 2), []
    for _ in range(count):
        look = draw_look(rng, rng.uniform(*RADII))
        if rng.random() < 0.25:  # a double: two equal objects in one frame need not have split
            look = dataclasses.replace(
                actor, radius=actor.radius * pose.scale[0], tilt=rng.uniform(0, 2 * np.pi)
            )
        places = rng.uniform(6, SIZE - 6, (8, 2))
        place = places[np.linalg.norm(places[:, None] - taken, axis=-1).min(1).argmax()]
        taken = np.concatenate([taken, place[None]])
        found.append((look, place))
    return found


def _swapped(rng: np.random.Generator, look: Look, quirk: str | None) -> Look:
    # what the object looks like after the quirk
    if quirk == "texture":
        texture = rng.choice([t for t in TEXTURES if t not in (look.texture, "plain")])
        return dataclasses.replace(look, texture=str(texture))
    if quirk == "colour":
        return dataclasses.replace(look, front=1 - 0.9 * look.front, back=1 - look.back)
    return look


def _perform(
    rng: np.random.Generator, frames: np.ndarray, looks: list[Look], staged: Play, pose: Pose
) -> None:
    # paints the acting bodies, as they look before and after a quirk
    split = int(np.searchsorted(FRAME_TIMES, staged.when))
    for look, centres in zip(looks, pose.centres, strict=False):  # one body or two
        after = _swapped(rng, look, staged.quirk)
        for part, seen in ((slice(None, split), look), (slice(split, None), after)):
            if len(centres[part]):
                paint(frames[part], seen, centres[part], pose.scale[part], pose.angle[part])


def render(seed: int, split_id: int, index: int, split: str = "", without: str = "") -> Clip:
    """Example `index` of a split, a pure function of its arguments; the label is index % 12.

    without: 'sight' leaves out who acts, so that the sound alone tells what is done, 'sound' all
    but the room's noise.
    """
    rng = np.random.default_rng([seed, split_id, index])
    action = ACTIONS[index % len(ACTIONS)]
    actor, second = (draw_look(rng, rng.uniform(*RADII)) for _ in range(2))
    staged = actions.play(rng, action, np.array([actor.radius, second.radius]))
    pose = staged.at(FRAME_TIMES)
    camera = _camera(rng)
    shaken = dataclasses.replace(pose, centres=pose.centres + camera)
    seen = without != "sight"
    # the struck body of a collision is one of the bystanders that every action has
    others = _bystanders(rng, actor, pose, rng.integers(1, 4) - (seen and action == "collide"))
    foot = boxes(actor, staged.offset[None], np.ones(1), np.zeros(1))[0]
    floor = foot[0] + foot[2] / 2 if seen and staged.motion.floored else rng.uniform(SIZE / 2, SIZE)
    world = background(rng, floor)[None]
    still = np.ones(1), np.zeros(1)
    for look, place in others:
        paint(world, look, place[None] + PAD, *still)
    frames = _film(world[0], camera)
    looks = [actor, second if action == "collide" else actor]
    if seen:
        _perform(rng, frames, looks, staged, shaken)
    tracks = [
        boxes(look, c, pose.scale, pose.angle)
        for look, c in zip(looks, shaken.centres, strict=False)
    ]
    tracks += [
        boxes(look, place + camera, np.ones(len(camera)), np.zeros(len(camera)))
        for look, place in others
    ]
    caption = str(rng.choice(TEMPLATES)).format(look=actor.words, verb=rng.choice(VERBS[action]))
    return Clip(
        frames=np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8),
        audio=sound.synthesise(
            rng, None if without == "sound" else staged, actor.radius, TEXTURES.index(actor.texture)
        ),
        label=ACTIONS.index(action),
        caption=caption,
        tracks=(np.stack(tracks) / SIZE).astype(np.float32),
        contacts=staged.contacts,
        moment=float(staged.moment),
        abnormal_time=staged.when if staged.quirk else -1.0,
        name=f"{split or split_id}/{index:05d}",
    )
