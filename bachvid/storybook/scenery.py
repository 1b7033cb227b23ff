"""The backgrounds of the procedural world, painted layer by layer.

Coordinates are in frame sizes, x to the right and y down. Legend: H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Colour = tuple[float, float, float]

BACKGROUNDS = (
    "a snowy forest",
    "a sunny beach",
    "a desert",
    "a green meadow",
    "a night city",
    "a rocky coast with a lighthouse",
)


def paint_background(background: int, rng: np.random.Generator, size: int) -> Array:
    """Return BACKGROUNDS[background] as float32 [size, size, 3] in 0..1, details drawn by `rng`."""
    scene = _Scene(rng, size)
    (_snowy_forest, _beach, _desert, _meadow, _city, _coast)[background](scene)
    tint = rng.uniform(-0.05, 0.05, 3) + rng.uniform(-0.05, 0.05)
    return np.clip(scene.canvas + tint.astype(np.float32), 0.0, 1.0)


class _Scene:
    """A canvas with a few brushes; `pick` draws the free choices."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = np.meshgrid(axis, axis)
        self.softness = np.float32(1.0 / size)
        self.rng = rng
        self.canvas = np.zeros((size, size, 3), np.float32)

    def pick(self, low: float, high: float) -> float:
        """Draw a number between `low` and `high`."""
        return float(self.rng.uniform(low, high))

    def lay(self, distance: Array, colour: Colour | Array) -> None:
        """Paint where the signed `distance` (frame sizes) is negative, with soft edges."""
        alpha = np.clip(0.5 - distance / self.softness, 0.0, 1.0)[..., None]
        self.canvas += alpha * (np.asarray(colour, np.float32) - self.canvas)

    def sky(self, top: Colour, horizon: Colour) -> None:
        """Fill the canvas with a vertical gradient."""
        blend = np.clip(self.y / 0.7, 0, 1)[..., None]
        self.canvas[:] = np.asarray(top, np.float32) * (1 - blend) + np.float32(
            1
        ) * blend * np.asarray(horizon, np.float32)

    def disc(self, x: float, y: float, radius: float, colour: Colour, flatten: float = 1.0) -> None:
        """Paint an ellipse; `flatten` > 1 makes it wider than high."""
        self.lay(np.hypot(self.x - x, (self.y - y) * flatten) - radius, colour)

    def hills(self, level: float, height: float, waves: float, colour: Colour) -> None:
        """Paint everything under a wavy line around `level`."""
        line = level - height * np.sin(waves * 2 * np.pi * self.x + self.pick(0, 6.28))
        self.lay((line - self.y).astype(np.float32), colour)

    def ground(self, level: float, near: Colour, far: Colour) -> None:
        """Paint the floor from `level` down, shaded from `far` to `near`."""
        blend = np.clip((self.y - level) / (1 - level), 0, 1)[..., None]
        colour = np.asarray(far, np.float32) * (1 - blend) + np.asarray(near, np.float32) * blend
        self.lay(np.float32(level) - self.y, colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Paint an upright rectangle."""
        dx = np.maximum(left - self.x, self.x - right)
        dy = np.maximum(top - self.y, self.y - bottom)
        self.lay(np.maximum(dx, dy), colour)

    def triangle(self, x: float, top: float, bottom: float, half: float, colour: Colour) -> None:
        """Paint an isosceles triangle standing on `bottom`."""
        reach = half * (self.y - top) / (bottom - top)
        self.lay(np.maximum(np.abs(self.x - x) - reach, self.y - bottom), colour)

    def cloud(self, colour: Colour) -> None:
        """Paint a cloud somewhere in the sky."""
        x, y, r = self.pick(0.08, 0.92), self.pick(0.07, 0.27), self.pick(0.07, 0.11)
        self.disc(x, y, r, colour, 2.0)
        self.disc(x + 0.9 * r, y + 0.02, 0.75 * r, colour, 1.8)


def _snowy_forest(scene: _Scene) -> None:
    scene.sky((0.62, 0.78, 0.93), (0.90, 0.95, 1.0))
    if scene.pick(0, 1) < 0.5:
        scene.disc(scene.pick(0.1, 0.9), scene.pick(0.1, 0.2), 0.07, (1.0, 0.98, 0.85))
    scene.hills(0.60, 0.05, scene.pick(0.6, 1.4), (0.78, 0.85, 0.92))
    scene.ground(0.70, (0.99, 0.99, 1.0), (0.86, 0.91, 0.97))
    for x in np.sort(scene.rng.uniform(0.0, 1.0, 6)):
        top, half = scene.pick(0.22, 0.42), scene.pick(0.09, 0.13)
        shade = scene.pick(0.8, 1.1)
        scene.box(x - 0.02, 0.70, x + 0.02, 0.78, (0.30, 0.20, 0.14))
        scene.triangle(x, top, 0.73, half, (0.08 * shade, 0.34 * shade, 0.24 * shade))
        scene.triangle(x, top, top + 0.16, half * 0.45, (0.95, 0.97, 1.0))


def _beach(scene: _Scene) -> None:
    scene.sky((0.25, 0.62, 0.95), (0.78, 0.92, 1.0))
    scene.disc(
        scene.pick(0.1, 0.9), scene.pick(0.1, 0.24), scene.pick(0.07, 0.10), (1.0, 0.93, 0.40)
    )
    for _ in range(int(scene.rng.integers(0, 3))):
        scene.cloud((1.0, 1.0, 1.0))
    scene.box(-0.1, scene.pick(0.46, 0.52), 1.1, 0.72, (0.05, 0.45, 0.72))
    scene.hills(0.69, 0.02, scene.pick(1.5, 2.5), (0.90, 0.97, 0.98))
    scene.hills(0.72, 0.02, scene.pick(0.8, 1.6), (0.96, 0.86, 0.62))
    x, tall = scene.pick(0.08, 0.92), scene.pick(0.30, 0.42)
    canopy: Colour = ((0.95, 0.25, 0.25), (0.20, 0.55, 0.90), (0.98, 0.80, 0.15))[
        scene.rng.integers(3)
    ]
    scene.box(x - 0.012, tall, x + 0.012, 0.86, (0.55, 0.38, 0.22))
    scene.triangle(x, tall - 0.03, tall + 0.13, 0.20, canopy)


def _desert(scene: _Scene) -> None:
    scene.sky((0.98, 0.62, 0.30), (1.0, 0.88, 0.60))
    scene.disc(
        scene.pick(0.1, 0.9), scene.pick(0.12, 0.35), scene.pick(0.08, 0.12), (1.0, 0.96, 0.75)
    )
    scene.hills(0.60, 0.08, scene.pick(0.5, 1.2), (0.86, 0.55, 0.30))
    scene.hills(0.70, 0.05, scene.pick(0.6, 1.5), (0.93, 0.68, 0.38))
    scene.ground(0.78, (0.98, 0.80, 0.50), (0.93, 0.70, 0.40))
    for x in scene.rng.uniform(0.05, 0.95, 2):
        top, side = scene.pick(0.36, 0.50), 0.09 if scene.pick(0, 1) < 0.5 else -0.09
        green: Colour = (0.18, 0.45, 0.22)
        scene.box(x - 0.032, top, x + 0.032, 0.80, green)
        scene.box(min(x, x + side), 0.62, max(x, x + side), 0.67, green)
        scene.box(x + side - 0.025, 0.52, x + side + 0.025, 0.67, green)


def _meadow(scene: _Scene) -> None:
    scene.sky((0.36, 0.66, 0.96), (0.82, 0.93, 1.0))
    for _ in range(int(scene.rng.integers(1, 4))):
        scene.cloud((1.0, 1.0, 1.0))
    scene.hills(0.58, 0.07, scene.pick(0.5, 1.3), (0.45, 0.72, 0.38))
    scene.hills(0.68, 0.05, scene.pick(0.5, 1.3), (0.36, 0.66, 0.26))
    x, crown = scene.pick(0.08, 0.92), scene.pick(0.12, 0.17)
    scene.box(x - 0.03, 0.45, x + 0.03, 0.74, (0.42, 0.27, 0.15))
    scene.disc(x, 0.42, crown, (0.14, 0.46, 0.18))
    scene.ground(0.76, (0.34, 0.70, 0.22), (0.44, 0.78, 0.30))
    petal: Colour = ((1.0, 0.95, 0.95), (1.0, 0.45, 0.55), (1.0, 0.90, 0.25))[scene.rng.integers(3)]
    for _ in range(7):
        scene.disc(scene.pick(0.02, 0.98), scene.pick(0.80, 0.97), 0.022, petal)


def _city(scene: _Scene) -> None:
    scene.sky((0.10, 0.12, 0.38), (0.34, 0.26, 0.58))
    scene.disc(
        scene.pick(0.1, 0.9), scene.pick(0.08, 0.2), scene.pick(0.05, 0.08), (0.98, 0.97, 0.85)
    )
    left = -0.05
    while left < 1.0:
        right, top = left + scene.pick(0.15, 0.24), scene.pick(0.22, 0.52)
        shade = scene.pick(0.8, 1.3)
        scene.box(left, top, right - 0.015, 0.80, (0.22 * shade, 0.24 * shade, 0.42 * shade))
        for y in np.arange(top + 0.06, 0.72, 0.11):
            for x in np.arange(left + 0.045, right - 0.05, 0.075):
                if scene.pick(0, 1) < 0.55:
                    scene.box(x - 0.018, y - 0.022, x + 0.018, y + 0.022, (1.0, 0.86, 0.42))
        left = right
    scene.ground(0.78, (0.34, 0.34, 0.40), (0.22, 0.22, 0.28))
    scene.box(-0.1, 0.955, 1.1, 0.975, (0.85, 0.80, 0.45))


def _coast(scene: _Scene) -> None:
    scene.sky((0.48, 0.66, 0.80), (0.88, 0.90, 0.92))
    for _ in range(int(scene.rng.integers(1, 3))):
        scene.cloud((0.97, 0.97, 0.98))
    scene.box(-0.1, 0.54, 1.1, 0.8, (0.10, 0.36, 0.52))
    x = scene.pick(0.10, 0.26) if scene.pick(0, 1) < 0.5 else scene.pick(0.74, 0.90)
    top, band = scene.pick(0.16, 0.26), 0.085
    scene.disc(x, 0.66, 0.20, (0.34, 0.33, 0.35), 1.6)
    scene.box(x - 0.058, top, x + 0.058, 0.58, (0.97, 0.96, 0.94))
    for y in (top + 0.6 * band, top + 2.6 * band):
        scene.box(x - 0.058, y, x + 0.058, y + band, (0.85, 0.14, 0.14))
    scene.box(x - 0.042, top - 0.07, x + 0.042, top, (1.0, 0.90, 0.45))
    scene.triangle(x, top - 0.14, top - 0.06, 0.06, (0.70, 0.10, 0.12))
    scene.ground(0.74, (0.52, 0.50, 0.50), (0.38, 0.37, 0.40))
    for _ in range(3):
        scene.disc(
            scene.pick(0, 1),
            scene.pick(0.76, 0.86),
            scene.pick(0.04, 0.08),
            (0.30, 0.29, 0.32),
            1.5,
        )
