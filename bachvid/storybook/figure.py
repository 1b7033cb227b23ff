"""The characters of the procedural world: posed parts with their rest pose.

Lengths are in figure heights, y up, feet at 0, x = 0 in the middle. Legend: F frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Colour = tuple[float, float, float]
Point = tuple[float, float]

CHARACTERS = (
    "a girl in a yellow dress",
    "a man in a red coat",
    "a woman in a purple suit",
    "a boy in a blue shirt",
    "a green robot",
    "an orange cat",
)
ACTIONS = (
    "stands still",
    "walks to the right",
    "walks to the left",
    "jumps",
    "waves an arm",
    "squats",
)
# What the prompt leaves open of a character and the judge reads: name -> values.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "hat": ("cap", "top hat", "cone", "crown"),
    "hat_colour": ("lime", "black", "pink", "cyan"),
    "pattern": ("plain", "stripes", "sash"),
    "skin": ("light", "tan", "dark"),
}

_HAT_COLOURS: tuple[Colour, ...] = (
    (0.66, 0.96, 0.08),
    (0.07, 0.07, 0.09),
    (0.99, 0.36, 0.68),
    (0.08, 0.86, 0.92),
)
_SKINS: tuple[Colour, ...] = ((0.99, 0.84, 0.72), (0.80, 0.56, 0.38), (0.40, 0.25, 0.16))
_METALS: tuple[Colour, ...] = ((0.88, 0.90, 0.92), (0.60, 0.64, 0.68), (0.28, 0.31, 0.36))
_FURS: tuple[Colour, ...] = ((1.00, 0.94, 0.84), (0.99, 0.72, 0.40), (0.55, 0.26, 0.08))
_EYE: Colour = (0.04, 0.04, 0.06)


@dataclass(frozen=True, slots=True)
class Look:
    """What the prompt says of a character: garment, legs, hair, build."""

    body: Colour
    legs: Colour
    hem: float  # half width of the garment at its lower end
    garment_end: float  # height of that end
    skins: tuple[Colour, ...] = _SKINS
    hair: Colour | None = None
    boxy: bool = False
    tail: bool = False


LOOKS = (
    Look((1.00, 0.85, 0.08), (0.60, 0.38, 0.22), 0.225, 0.20, hair=(0.45, 0.22, 0.08)),
    Look((0.88, 0.08, 0.10), (0.15, 0.15, 0.22), 0.165, 0.22),
    Look((0.56, 0.14, 0.74), (0.40, 0.08, 0.56), 0.120, 0.36, hair=(0.10, 0.06, 0.06)),
    Look((0.10, 0.32, 0.95), (0.92, 0.88, 0.76), 0.135, 0.34),
    Look((0.14, 0.68, 0.24), (0.08, 0.36, 0.16), 0.150, 0.33, skins=_METALS, boxy=True),
    Look((0.99, 0.52, 0.06), (0.92, 0.42, 0.04), 0.150, 0.27, skins=_FURS, tail=True),
)


@dataclass(frozen=True, slots=True)
class Part:
    """A tapered stroke, drawn over the parts before it.

    start, end [F, 2] posed; rest_start, rest_end in the rest pose; radius at both ends.
    """

    start: Array
    end: Array
    rest_start: Point
    rest_end: Point
    radius: tuple[float, float]
    colour: Colour
    flat: bool  # flat ends instead of round ones
    pattern: int  # index into ATTRIBUTES["pattern"]


@dataclass(frozen=True, slots=True)
class Pose:
    """A figure over time; every array is [F], the hands [F, 2] relative to their shoulders."""

    travel: Array  # -1..1, horizontal place
    lift: Array  # 0..1, height over the ground
    crouch: Array  # 0..1, how far the hips sink
    stride: Array  # -1..1, how far apart the feet are
    hands: tuple[Array, Array]
    gaze: float  # -1..1, where the eyes look


def pose_figure(action: int, num_frames: int) -> Pose:
    """Return the pose of ACTIONS[action] over `num_frames` frames."""
    u = np.linspace(0.0, 1.0, num_frames, dtype=np.float32)
    still = np.zeros_like(u)
    travel, lift, crouch, stride, gaze = still, still, still, still, 0.0
    left, right = _hand(still - 0.35), _hand(still + 0.35)
    match ACTIONS[action]:
        case "walks to the right" | "walks to the left":
            gaze = 1.0 if ACTIONS[action].endswith("right") else -1.0
            travel = np.float32(gaze) * (2 * u - 1)
            stride = np.cos(2 * np.pi * u)
            left, right = _hand(0.65 * stride - 0.2), _hand(0.65 * stride + 0.2)
        case "jumps":
            lift = np.sin(np.pi * u)
            stride = 0.5 * lift
            left, right = _hand(-0.6 - 1.7 * lift), _hand(0.6 + 1.7 * lift)
        case "waves an arm":
            right = _hand(2.35 + 0.55 * np.cos(2 * np.pi * u), length=0.33)
        case "squats":
            crouch = np.minimum(1.0, 1.5 * np.sin(np.pi * (0.06 + 0.88 * u)))
            left, right = _hand(-0.35 - 1.1 * crouch), _hand(0.35 + 1.1 * crouch)
    return Pose(travel, lift, crouch, stride, (left, right), gaze)


def build_figure(character: int, attributes: Mapping[str, int], pose: Pose) -> list[Part]:
    """Return the parts of a character from back to front."""
    look = LOOKS[character]
    skin = look.skins[attributes["skin"]]
    figure = _Figure(drop=-0.17 * pose.crouch)
    if look.tail:
        figure.add((0.08, 0.28), (0.32, 0.44), (0.050, 0.040), look.body)
    if look.hair is not None:
        figure.add((0.0, 0.78), (0.0, 0.56), (0.175, 0.170), look.hair)
    for side in (-1.0, 1.0):
        hip, knee, foot = (side * 0.075, 0.36), (side * 0.085, 0.20), (side * 0.085, 0.045)
        bent = figure.at(
            side * (0.085 + 0.11 * pose.crouch + 0.06 * pose.stride), 0.20 + 0.35 * figure.drop
        )
        planted = figure.at(side * (0.085 + 0.05 * pose.crouch + 0.13 * pose.stride), 0.045)
        figure.add(hip, knee, (0.064, 0.056), look.legs, moved_end=bent)
        figure.add(knee, foot, (0.056, 0.052), look.legs, moved_start=bent, moved_end=planted)
    top = 0.155 if look.boxy else 0.120
    figure.add(
        (0.0, 0.585),
        (0.0, look.garment_end),
        (top, look.hem),
        look.body,
        flat=True,
        pattern=attributes["pattern"],
    )
    for side, hand in zip((-1.0, 1.0), pose.hands, strict=True):
        joint, wrist, tip = (side * 0.13, 0.545), (side * 0.22, 0.29), (side * 0.235, 0.26)
        palm = figure.at(joint[0], joint[1] + figure.drop) + hand
        figure.add(joint, wrist, (0.054, 0.048), look.body, moved_end=palm)
        figure.add(wrist, tip, (0.052, 0.052), skin, moved_start=palm, moved_end=palm + 0.12 * hand)
    if look.boxy:
        figure.add((0.0, 0.585), (0.0, 0.87), (0.165, 0.165), skin, flat=True)
    else:
        figure.add((0.0, 0.72), (0.0, 0.735), (0.160, 0.160), skin)
    if look.tail:
        for side in (-1.0, 1.0):
            figure.add((side * 0.115, 0.79), (side * 0.16, 0.96), (0.070, 0.015), look.body)
    if look.hair is not None:
        figure.add((-0.115, 0.835), (0.115, 0.835), (0.058, 0.058), look.hair)
    for side in (-1.0, 1.0):
        x, shift = side * 0.068, 0.05 * pose.gaze
        ends = [figure.at(x + shift, y + figure.drop) for y in (0.745, 0.715)]
        figure.add(
            (x, 0.745), (x, 0.715), (0.028, 0.028), _EYE, moved_start=ends[0], moved_end=ends[1]
        )
    figure.add_hat(ATTRIBUTES["hat"][attributes["hat"]], _HAT_COLOURS[attributes["hat_colour"]])
    return figure.parts


def _hand(angle: Array, length: float = 0.27) -> Array:
    """Return [F, 2]: a hand at `angle` radians from hanging down, positive to the right."""
    return np.stack([np.sin(angle), -np.cos(angle)], axis=-1).astype(np.float32) * length


@dataclass(slots=True)
class _Figure:
    """Collects parts; one that is not moved follows the hips, which sink by `drop` [F]."""

    drop: Array
    parts: list[Part] = field(default_factory=list)

    def at(self, x: float | Array, y: float | Array) -> Array:
        """Return points [F, 2]."""
        xs, ys, _ = np.broadcast_arrays(x, y, self.drop)
        return np.stack([xs, ys], axis=-1).astype(np.float32)

    def add(
        self,
        start: Point,
        end: Point,
        radius: tuple[float, float],
        colour: Colour,
        *,
        moved_start: Array | None = None,
        moved_end: Array | None = None,
        flat: bool = False,
        pattern: int = 0,
    ) -> None:
        """Append a part given by its rest pose, and by its posed ends where they move."""
        if moved_start is None:
            moved_start = self.at(start[0], start[1] + self.drop)
        if moved_end is None:
            moved_end = self.at(end[0], end[1] + self.drop)
        self.parts.append(Part(moved_start, moved_end, start, end, radius, colour, flat, pattern))

    def add_hat(self, hat: str, colour: Colour) -> None:
        """Append the strokes of a hat."""
        match hat:
            case "cap":
                self.add((-0.05, 0.870), (0.05, 0.870), (0.110, 0.110), colour)
                self.add((0.0, 0.835), (0.34, 0.820), (0.042, 0.036), colour)
            case "top hat":
                self.add((-0.26, 0.855), (0.26, 0.855), (0.036, 0.036), colour)
                self.add((0.0, 0.86), (0.0, 1.13), (0.145, 0.155), colour, flat=True)
            case "cone":
                self.add((0.0, 0.82), (0.0, 1.24), (0.190, 0.008), colour, flat=True)
            case "crown":
                self.add((0.0, 0.82), (0.0, 0.90), (0.185, 0.200), colour, flat=True)
                for x in (-0.170, 0.0, 0.170):
                    self.add((x, 0.89), (x * 1.18, 1.10), (0.062, 0.006), colour)
