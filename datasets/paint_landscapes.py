#!/usr/bin/env python3
"""Paints synthetic landscapes: the example training set of this project.

Every picture is planned from its seed alone (`plan_scene`) and then rendered at any size (`paint`).
The plan holds a small world in metres: a height field, water at height zero, a sky with clouds, a
sun or moon, trees. Rendering walks the height field front to back, column by column, and so gets
perspective, ridges hiding one another and snow by altitude for free. Nothing random happens per
pixel: all texture is lattice noise at world positions, faded out where it is finer than a pixel, so
that a seed is the same scene at any size.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

STREAM = 20240  # separates these random streams from any other use of the same seeds
# With full colour resolution, the highest quality at which the 4,096 pictures of 96 px stay below
# 12 MB.
JPEG = {"quality": 81, "optimize": True, "subsampling": 0}
FOLDER = Path(__file__).resolve().parent / "landscapes"
Array = np.ndarray


def rgb(*channels: int) -> Array:
    """Return a colour given as 0..255 as a float32 array (3,) in 0..1."""
    return np.array(channels, np.float32) / 255


def colours(codes: str) -> list[Array]:
    """Return the colours of several hexadecimal codes."""
    return [rgb(*bytes.fromhex(code)) for code in codes.split()]


@dataclass
class Light:
    """Colours (each (3,) in 0..1) and habits of one time of day."""

    share: float  # how often it is drawn
    zenith: Array
    middle: Array
    horizon: Array
    sun: Array  # colour and strength of the direct light
    ambient: Array  # light from the whole sky
    cloud: Array  # sunlit side of clouds
    shade: Array  # shaded side of clouds
    elevation: tuple[float, float]  # slope of the sun above the horizon
    sight: float = 1.0  # how far one sees, 1 = clear


# Colours in the order of Light: zenith, middle, horizon, sun, ambient, cloud, shade.
LIGHTS = {
    "day": Light(
        0.29, *colours("2c68bc 70a8e0 cee2ee ffeece 707e94 fffdfa 9eacc2"), (0.35, 0.9), 1.3
    ),
    "hazy": Light(
        0.08, *colours("7898ba a8bece e2e2d6 ebd8b2 848a92 f8f4ec b4bac0"), (0.3, 0.7), 0.42
    ),
    "golden": Light(
        0.16, *colours("5280b8 b2bebc ffde9e ffcc7a 6c6c7a ffeac4 a6989c"), (0.1, 0.3), 0.9
    ),
    "dawn": Light(
        0.10, *colours("4c64a0 b09cbc ffceaa ffbe96 767086 ffccbe 9280a0"), (0.03, 0.16), 0.55
    ),
    "sunset": Light(
        0.13, *colours("323a76 b8626a ffac54 ffa264 625e78 ff9864 704a68"), (0.02, 0.14), 0.8
    ),
    "dusk": Light(
        0.06, *colours("242e62 625a98 e2928e c48296 605a7e e28e9c 544a78"), (0.01, 0.08), 0.7
    ),
    "storm": Light(
        0.09, *colours("4a5260 707a84 bac0bc b2b0a0 767c84 acb0b2 464e5a"), (0.3, 0.6), 0.45
    ),
    "night": Light(
        0.09, *colours("0c1638 1e3262 546c98 6c88c8 3e5694 8092bc 202a4c"), (0.14, 0.42), 0.8
    ),
}


@dataclass
class Biome:
    """Ground colours (each (3,) in 0..1) and plants of one kind of country."""

    share: float
    grass: Array
    meadow: Array  # second ground colour, in patches
    rock: Array
    tree: Array
    conifers: float  # share of conifers among the trees
    wooded: float  # how much of the hills is forest
    snowline: tuple[float, float] | None  # in parts of the highest peak; None: no snow
    fields: bool = False  # farmland patchwork


# Colours in the order of Biome: grass, meadow, rock, tree.
BIOMES = {
    "meadow": Biome(0.18, *colours("66923a 92a84c 807a72 2e5824"), 0.35, 0.45, (0.55, 1.1), True),
    "forest": Biome(0.17, *colours("4a7036 6e8440 70706c 1e462a"), 0.8, 0.85, (0.5, 1.1)),
    "autumn": Biome(0.11, *colours("a4843e 8c8640 7c726a c46220"), 0.2, 0.7, (0.6, 1.1), True),
    "steppe": Biome(0.08, *colours("c4a668 ac965c 967c68 5c6438"), 0.1, 0.1, (0.5, 1.1)),
    "snow": Biome(0.14, *colours("e8eef6 d6e0ee 6c6e7a 2a423c"), 0.95, 0.5, (-0.6, -0.12)),
    "heath": Biome(0.07, *colours("7e7254 96747e 767070 424c30"), 0.4, 0.2, (0.6, 1.1)),
    "wheat": Biome(0.10, *colours("dab85c a6a44c 8c8070 3c5c2a"), 0.15, 0.4, None, True),
    "tundra": Biome(0.07, *colours("888662 987c54 747476 404c36"), 0.9, 0.15, (0.3, 0.8)),
    "lavender": Biome(0.05, *colours("8470a8 7a9048 92867a 385630"), 0.1, 0.3, None, True),
}
DESERT = Biome(0.00, *colours("deac6e ce945c a8704e 58683c"), 0, 0, None)
REDROCK = Biome(0.00, *colours("c88054 b08a5c ba5e3c 5c6c42"), 0.1, 0, None)

# Per kind of land its share, the styles of its far relief and the ranges of its measures: where the
# relief
# starts and how many times farther it is complete, its wave length, the slope of the skyline, the
# height of
# the rolling ground near by, and that of the eye above it.
KINDS = {
    "mountains": (
        0.22,
        ["alpine"],
        (700, 2200),
        (2, 3.5),
        (1100, 2800),
        (0.12, 0.34),
        (3, 16),
        (3, 28),
    ),
    "hills": (0.15, ["round"], (60, 240), (4, 4), (260, 900), (0.05, 0.17), (3, 9), (3, 28)),
    "lake": (
        0.19,
        ["alpine", "round"],
        (160, 800),
        (3, 3),
        (900, 2200),
        (0.1, 0.3),
        (2, 5),
        (2.5, 9),
    ),
    "sea": (
        0.15,
        ["alpine", "round"],
        (120, 1400),
        (2, 3),
        (200, 700),
        (0.03, 0.17),
        (1, 2),
        (2.5, 12),
    ),
    "plain": (
        0.10,
        ["alpine", "round"],
        (1500, 4000),
        (2, 3),
        (1100, 2800),
        (0.01, 0.07),
        (1, 5),
        (3, 28),
    ),
    "river": (
        0.08,
        ["alpine", "round"],
        (250, 900),
        (2, 3.5),
        (1100, 2800),
        (0.1, 0.32),
        (1, 4),
        (6, 20),
    ),
    "dunes": (0.06, ["dune"], (30, 90), (4, 4), (110, 340), (0.04, 0.15), (1, 3), (9, 26)),
    "canyon": (0.05, ["mesa"], (250, 700), (1.6, 1.6), (500, 1100), (0.08, 0.24), (2, 6), (3, 28)),
}
SEAS = colours("184a70 14566e 226070 126882")
FLOWERS = colours("ecce46 de463e f4f4ec a870ce f082aa")


# --------------------------------------------------------------------------------------------------
# small tools


def mix(a: Array, b: Array, share: Array | float) -> Array:
    """Return a where share is 0, b where it is 1."""
    return a + (b - a) * share


def smooth(low: float, high: float, x: Array) -> Array:
    """Return 0 below low, 1 above high, an S curve between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class Noise:
    """Smooth random functions of the plane.

    The same position has the same value at every resolution.
    """

    SIDE = 128  # the lattice repeats after this many cells; rotated octaves hide it

    def __init__(self, rng: np.random.Generator):
        a = rng.uniform(-1, 1, (self.SIDE, self.SIDE)).astype(np.float32)
        b, c = np.roll(a, -1, 1), np.roll(a, -1, 0)
        d = np.roll(b, -1, 0)
        # One row of four bilinear coefficients per cell: a single gather fetches all that a point
        # needs.
        self.cells = np.stack([a, b - a, c - a, a - b - c + d], -1).reshape(-1, 4)

    def value(self, x: Array, y: Array) -> Array:
        """Return one octave, in -1..1, with waves about two units long."""
        xf, yf = np.floor(x), np.floor(y)
        mask = self.SIDE - 1
        k = self.cells.take(
            (yf.astype(np.int32) & mask) * self.SIDE + (xf.astype(np.int32) & mask), axis=0
        )
        u, v = x - xf, y - yf
        u = u * u * u * (u * (u * 6 - 15) + 10)
        v = v * v * v * (v * (v * 6 - 15) + 10)
        return k[..., 0] + k[..., 1] * u + (k[..., 2] + k[..., 3] * u) * v

    def octaves(self, x: Array, y: Array, count: int, gain: float, pixel: Array | float):
        """Yield (weight, value) per octave.

        Weights fall to 0 where the waves are finer than `pixel`.
        """
        x, y = np.float32(x), np.float32(y)
        amplitude, wave = 1.0, 1.0
        for _ in range(count):
            weight = amplitude * np.clip(2.4 - 2 * pixel / wave, 0, 1)
            if np.size(weight) == 0 or np.max(weight) <= 0:
                break
            yield weight, self.value(x, y)
            # Doubled frequency, turned by 37 degrees so that lattice lines never add up.
            x, y = 1.6 * x - 1.2 * y + np.float32(17.3), 1.2 * x + 1.6 * y + np.float32(41.7)
            amplitude, wave = amplitude * gain, wave / 2

    def fbm(
        self, x: Array, y: Array, count: int = 5, gain: float = 0.5, pixel: Array | float = 0.0
    ) -> Array:
        """Return fractal noise, mostly in -1..1, with a standard deviation of about 0.4."""
        norm = math.sqrt((1 - gain ** (2 * count)) / (1 - gain**2))
        return sum(
            w * v for w, v in self.octaves(x, y, count, gain, pixel)
        ) / norm + 0 * np.float32(x)

    def ridged(self, x: Array, y: Array, count: int = 7, pixel: Array | float = 0.0) -> Array:
        """Return mountain-like noise in about 0..1.

        Crests are sharp, and detail grows on the crests only.
        """
        total, carry = 0 * np.float32(x), 1.0
        for weight, v in self.octaves(x, y, count, 0.5, pixel):
            crest = (1 - np.abs(v)) ** 2 * carry
            total = total + weight * crest
            carry = np.clip(crest * 1.7, 0, 1)
        return total / 1.6


# --------------------------------------------------------------------------------------------------
# planning


@dataclass
class Cloud:
    """One layer of clouds."""

    style: str  # "cumulus", "wisps" or "deck"
    scale: float
    cover: float
    opacity: float
    shift: float


@dataclass
class Plant:
    """One tree, bush, boulder or cactus: foot at (x, z) metres, `detail` seeds its own shape."""

    shape: str
    x: float
    z: float
    height: float
    colour: Array
    detail: int


@dataclass
class Scene:
    """All decisions about one picture; lengths in metres, directions as slopes (x / z, y / z)."""

    kind: str
    time: str
    light: Light
    biome: Biome
    noise: Noise
    fov: float  # width of the picture as a slope
    horizon: float  # height of eye level in the picture, 0 = top
    eye: float
    sun: tuple[float, float]  # slope to the right and up
    sun_ahead: bool
    towards_sun: Array  # unit vector (right, up, ahead)
    disc: float  # radius of sun or moon, 0 = not drawn
    land: dict[str, float | str | list] = field(default_factory=dict)
    clouds: list[Cloud] = field(default_factory=list)
    plants: list[Plant] = field(default_factory=list)
    extras: dict[str, float | Array] = field(default_factory=dict)
    camera: float = 0.0  # height of the camera above water level
    lift: float = 1.0  # stretches what rises above the camera
    peak: float = 1.0  # height of the highest visible ground


def pick(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """Draw a name in proportion to its share."""
    weights = np.array(list(shares.values()))
    return list(shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]


def vary(rng: np.random.Generator, colour: Array, amount: float = 0.05) -> Array:
    """Return the colour a little lighter or darker and a little tinted."""
    tint = rng.normal(0, amount * 0.5, 3)
    return np.clip(colour * (1 + rng.normal(0, amount)) + tint * colour, 0, 1.15).astype(np.float32)


def plan_scene(seed: int) -> Scene:
    """Decide everything about the picture of this seed."""
    rng = np.random.default_rng([STREAM, seed])
    kind = pick(rng, {name: row[0] for name, row in KINDS.items()})
    time = pick(rng, {name: light.share for name, light in LIGHTS.items()})
    biome_name = pick(rng, {name: biome.share for name, biome in BIOMES.items()})
    if (time, biome_name) == ("night", "lavender"):
        biome_name = "meadow"  # by moonlight lavender turns into an unlikely blue
    biome = {"dunes": DESERT, "canyon": REDROCK}.get(kind, BIOMES[biome_name])
    base = LIGHTS[time]
    skies = {
        name: vary(rng, getattr(base, name)) for name in ("zenith", "middle", "horizon", "cloud")
    }
    light = Light(**{**vars(base), **skies})
    tints = {
        name: vary(rng, getattr(biome, name), 0.08) for name in ("grass", "meadow", "rock", "tree")
    }
    biome = Biome(**{**vars(biome), **tints})

    fov = rng.uniform(0.7, 1.05)
    low, high = {"sea": (0.32, 0.74), "lake": (0.38, 0.66), "river": (0.3, 0.6)}.get(
        kind, (0.32, 0.74)
    )
    horizon = float(np.clip(rng.normal((low + high) / 2, 0.11), low, high))
    ahead = bool(
        rng.random() < {"night": 0.85, "storm": 0.0, "day": 0.3, "hazy": 0.3}.get(time, 0.66)
    )
    slope = rng.uniform(*base.elevation)
    rise = min(slope, horizon * fov * 0.85)
    if ahead:
        sun = (rng.uniform(-0.42, 0.42) * fov, rise)
        towards = np.array([sun[0], rise + 0.12, 0.8])
    else:  # behind the painter or well to the side
        side = rng.choice([-1, 1])
        sun = (side * rng.uniform(0.9, 1.6), rise)
        towards = np.array([side * rng.uniform(0.5, 1.0), max(slope, 0.22), rng.uniform(-0.7, 0.3)])
    towards = (towards / np.linalg.norm(towards)).astype(np.float32)
    veiled = not ahead or (time == "hazy" and rng.random() < 0.5)
    disc = 0.0 if veiled else fov * rng.uniform(0.015, 0.034 if slope < 0.31 else 0.02)
    scene = Scene(
        kind, time, light, biome, Noise(rng), fov, horizon, 2.0, sun, ahead, towards, disc
    )
    plan_land(rng, scene)
    plan_sky(rng, scene)
    place_camera(scene)
    plan_plants(rng, scene)
    return scene


def plan_land(rng: np.random.Generator, scene: Scene) -> None:
    """Decide the height field: rolling ground near by, relief far away, water, and the cover."""
    kind, land, extras = scene.kind, scene.land, scene.extras
    _, styles, *ranges = KINDS[kind]
    names = ("start", "steep", "length", "skyline", "roll")
    land.update({name: rng.uniform(*span) for name, span in zip(names, ranges, strict=False)})
    scene.eye = float(np.exp(rng.uniform(*np.log(ranges[-1]))))
    land.update(
        style=str(rng.choice(styles)), water=kind if kind in ("lake", "sea", "river") else "none"
    )
    land.update(
        roll_length=rng.uniform(90, 320), tilt=rng.normal(0, 0.05), skew=rng.uniform(-1.6, 1.6)
    )
    # of shores in metres, else of paths and rivers as slopes
    bends = {"lake": (20, 160), "sea": (4, 18)}
    land.update(bend=rng.uniform(*bends.get(kind, (0.08, 0.3))), path=0.0, wide=rng.uniform(5, 22))
    # The near shore of lakes and seas; negative: the painter stands over water.
    land["near"] = rng.choice([-60.0, rng.uniform(8, 22), rng.uniform(14, 50)])
    land.update(side=rng.choice([-1, 1]) * rng.uniform(0.02, 0.45), headland=rng.random() < 0.62)
    # islands: direction, distance, width
    spans = rng.uniform((-0.5, 500, 0.03), (0.5, 4000, 0.12), (3, 3))
    land["islands"] = spans[
        : int(rng.choice([0, 0, 1, 2, 3] if land["headland"] else [1, 1, 2, 3]))
    ]
    if kind in ("mountains", "hills", "plain") and rng.random() < 0.3:
        land["path"] = rng.uniform(1.0, 2.6)
    # Most country is dry; where the ground dips below zero there are ponds.
    land["dry"] = land["roll"] * rng.choice([0.3, 1.2, 1.2, 1.2]) + 2
    if scene.biome.snowline:
        extras["snowline"] = rng.uniform(*scene.biome.snowline)
    extras["fields"] = (
        scene.biome.fields and kind in ("plain", "hills", "mountains") and rng.random() < 0.6
    )
    extras["flower"] = FLOWERS[rng.integers(len(FLOWERS))]
    blooming = scene.biome.share > 0 and scene.time != "night" and extras.get("snowline", 1) > 0.3
    extras["flowers"] = rng.uniform(0.3, 1.0) if blooming and rng.random() < 0.3 else 0.0
    extras["field_angle"] = rng.uniform(-0.9, 0.9)
    extras["wave"] = rng.uniform(0.25, 1.2)
    extras["deep"] = vary(
        rng, SEAS[rng.integers(len(SEAS))] if kind == "sea" else rgb(34, 66, 74), 0.1
    )
    extras["shallow"] = vary(rng, rgb(96, 190, 184) if kind == "sea" else rgb(96, 112, 88), 0.08)
    extras["sand"] = vary(
        rng, rgb(232, 208, 164) if rng.random() < 0.8 else rgb(150, 140, 132), 0.06
    )


def plan_sky(rng: np.random.Generator, scene: Scene) -> None:
    """Decide clouds, mist, precipitation, stars and the final grading."""
    extras, time = scene.extras, scene.time

    def add(
        style: str, cover: tuple[float, float], scale: tuple[float, float], opacity: float
    ) -> None:
        layer = Cloud(style, rng.uniform(*scale), rng.uniform(*cover), opacity, rng.uniform(0, 100))
        scene.clouds.append(layer)

    weather = {"clear": 0.18, "wisps": 0.24, "cumulus": 0.34, "both": 0.14, "deck": 0.10}
    choice = "deck" if time == "storm" else pick(rng, weather)
    if choice == "clear" and scene.kind in ("sea", "dunes") and rng.random() < 0.75:
        choice = "wisps"  # these have little else to look at
    if choice in ("wisps", "both"):
        add("wisps", (-0.1, 0.25), (0.7, 1.4), rng.uniform(0.5, 0.85))
    if choice in ("cumulus", "both"):
        add("cumulus", (-0.32, 0.12), (1.3, 2.6), 0.96)
    if choice == "deck":
        add("deck", (0.25, 0.7), (0.5, 1.1), 0.95)
    extras["sight"] = scene.light.sight * np.exp(rng.normal(0, 0.35)) * 9000
    mist_share = {"dawn": 0.5, "hazy": 0.35, "night": 0.05}.get(time, 0.12)
    extras["mist"] = rng.uniform(0.35, 1.0) if rng.random() < mist_share else 0.0
    extras["gaps"] = rng.uniform(-0.2, 0.5)
    extras["mist_height"] = rng.uniform(8, 40)
    snowing = scene.biome.conifers > 0.94 and rng.random() < 0.16
    extras["flakes"] = rng.uniform(0, 1, (260, 3)) if snowing else np.zeros((0, 3))
    if time == "night":
        extras["stars"] = rng.uniform(0, 1, (420, 3))
        extras["galaxy"] = rng.uniform(-0.9, 0.9) if rng.random() < 0.4 else 0.0
        extras["aurora"] = rng.uniform(0.5, 1.0) if rng.random() < 0.3 else 0.0
        extras["aurora_colour"] = mix(rgb(70, 240, 160), rgb(170, 110, 240), rng.uniform(0, 0.5))
    extras["saturation"], extras["contrast"] = rng.uniform(0.9, 1.2), rng.uniform(0.05, 0.45)
    extras["exposure"] = rng.uniform(0.94, 1.08)


def place_camera(scene: Scene) -> None:
    """Put the camera above the ground near by.

    The relief is stretched so that the skyline has its height.
    """
    x, z = np.meshgrid(np.linspace(-0.5, 0.5, 9), np.geomspace(3, 36, 16))
    near = np.maximum(ground_height(scene, x * z * scene.fov, z), 0)
    scene.camera = float(near.max() * 0.75 + near.mean() * 0.25 + scene.eye)
    x, z = np.meshgrid(np.linspace(-0.5, 0.5, 48), np.geomspace(40, 20000, 110))
    height = ground_height(scene, x * z * scene.fov, z)
    steepest = float(((height - scene.camera) / z).max())
    target = min(scene.land["skyline"], scene.horizon * scene.fov * 0.85)
    if steepest > 0.004:
        scene.lift = float(np.clip(target / steepest, 0.2, 4.0))
    above = scene.camera + (height - scene.camera) * scene.lift
    visible = np.where((above - scene.camera) / z > 0.5 * target, above, 0)
    scene.peak = max(float(visible.max()), 20.0)


def plan_plants(rng: np.random.Generator, scene: Scene) -> None:
    """Scatter trees in woods, rows and groups near by, and some boulders."""
    biome, land, kind = scene.biome, scene.land, scene.kind
    spots: list[tuple[float, float]] = []
    count = int(rng.choice([20, 90, 220]) * (0.4 + biome.wooded))
    count = {"dunes": 0, "canyon": int(rng.integers(10, 60))}.get(kind, count)
    nearest = {"lake": land["start"] * 0.9, "sea": land["start"]}.get(kind, 45)
    z = np.exp(rng.uniform(np.log(nearest), np.log(nearest * 16 + 300), count))
    x = rng.uniform(-0.6, 0.6, count) * scene.fov * z
    wood = scene.noise.fbm(x / 160 + 3.1, z / 160, 3)
    keep = wood > rng.uniform(-0.3, 0.25) - 0.3 * biome.wooded
    spots += zip(x[keep], z[keep], strict=True)
    if count and rng.random() < 0.6:  # a row along a hedge or a far shore
        start, step, depth = (
            rng.uniform(-0.6, 0.3),
            rng.uniform(0.01, 0.035),
            nearest * rng.uniform(1.3, 3),
        )
        drift = rng.uniform(-0.6, 0.6)
        for i in range(int(rng.integers(8, 40))):
            at = depth * (1 + drift * step * i) * rng.uniform(0.97, 1.03)
            spots.append(((start + step * (i + rng.uniform(-0.4, 0.4))) * scene.fov * at, at))
    side = rng.choice([-1, 1])
    if kind not in ("dunes", "sea") and rng.random() < 0.55:  # large ones, off the middle
        for at in np.exp(rng.uniform(np.log(20), np.log(60), rng.choice([1, 1, 2, 3, 5]))):
            spots.append((side * rng.uniform(0.12, 0.5) * scene.fov * at, at))
    lone = pick(rng, {"broad": 0.6, "poplar": 0.15, "bush": 0.25})
    foliage = vary(rng, biome.tree, 0.12)
    for x, z in spots:
        shape = lone if rng.random() < 0.8 else "broad"
        if rng.random() < biome.conifers:
            shape = "conifer"
        elif kind == "canyon" or biome.wooded < 0.15:
            shape = "cactus" if kind == "canyon" and rng.random() < 0.35 else "bush"
        evergreen = shape == "conifer" and biome.tree[0] > 0.5
        add_plant(
            rng, scene, shape, x, z, vary(rng, rgb(56, 84, 48) if evergreen else foliage, 0.12)
        )
    if kind == "sea" and land["near"] > 0 and biome.conifers < 0.9 and rng.random() < 0.35:
        for at in rng.uniform(16, 24, rng.integers(1, 4)):
            add_plant(
                rng, scene, "palm", side * rng.uniform(0.25, 0.5) * scene.fov * at, at, foliage
            )
    for at in np.exp(
        rng.uniform(np.log(9), np.log(60), rng.choice([0, 0, 0, 2, 4]) * (kind != "dunes"))
    ):
        x = rng.uniform(-0.5, 0.5) * scene.fov * at
        add_plant(rng, scene, "boulder", x, at, vary(rng, biome.rock, 0.08))


def add_plant(
    rng: np.random.Generator, scene: Scene, shape: str, x: float, z: float, colour: Array
) -> None:
    """Plant one at (x, z) metres, of a height usual for its shape."""
    tall = {
        "conifer": 13,
        "broad": 10,
        "poplar": 14,
        "bush": 2.2,
        "palm": 9,
        "cactus": 4,
        "boulder": 1.3,
    }[shape]
    tall = tall * rng.uniform(0.7, 1.25) * (1 + z / 40 if shape == "boulder" else 1)
    scene.plants.append(
        Plant(shape, float(x), float(z), float(tall), colour, int(rng.integers(1 << 30)))
    )


# --------------------------------------------------------------------------------------------------
# height field


def wander(scene: Scene, z: Array) -> Array:
    """Return the sideways position (metres) of the path or river at the depths z."""
    bend = scene.land.get("bend", 0.1)
    swing = scene.noise.fbm(np.log(np.maximum(z, 1.0)) * 1.1, 0 * z + 7.7, 2)
    return bend * z * swing * 1.5


def relief(scene: Scene, x: Array, z: Array, pixel: Array | float) -> Array:
    """Return the far land in about 0..1, before it is scaled to metres."""
    noise, style, length = scene.noise, scene.land["style"], scene.land["length"]
    px, pz, fine = x / length, z / length, pixel / length
    if style == "alpine":
        return noise.ridged(px, pz, 8, fine)
    if style == "round":
        return 0.5 + 0.55 * noise.fbm(px, pz, 6, 0.36, fine)
    if style == "dune":
        # Long windward slopes, steep slip faces; far away they melt into the plain.
        bent = noise.fbm(px * 0.8 + 9, pz * 0.8, 3, 0.4, fine)
        phase = pz + scene.land["skew"] * px + 0.9 * bent
        t = phase - np.floor(phase)
        crest = np.minimum(smooth(0, 0.74, t), np.clip((1 - t) / 0.26, 0, 1))
        crest = crest - 0.22 * smooth(0.72, 1.0, crest)
        tall = np.clip(0.55 + 0.9 * noise.fbm(px * 0.6 + 20, pz * 0.6, 2), 0.05, 1.3)
        return crest * tall * np.exp(-z / 1800) + 0.4 * noise.fbm(px * 0.35 + 5, pz * 0.35, 2)
    table = noise.fbm(px, pz, 5, 0.45, fine)  # mesas: two steep steps with talus at their feet
    rough = 0.10 * noise.fbm(px * 5, pz * 5, 4, 0.55, fine * 5)
    walls = 0.5 * smooth(0.02, 0.10, table + 0.3 * rough) + 0.45 * smooth(
        0.22, 0.29, table + 0.3 * rough
    )
    return 0.14 * smooth(-0.35, 0.05, table) + walls + 0.15 * rough


def ground_height(scene: Scene, x: Array, z: Array, pixel: Array | float = 0.0) -> Array:
    """Return the height (metres, same shape as x) of the ground; below 0 it lies under water."""
    land, noise = scene.land, scene.noise
    x, z = np.float32(x), np.float32(z)
    rise = smooth(0, 1, (z - land["start"]) / (land["start"] * (land["steep"] - 1) + 1))
    size = 0.2 * land["start"] * land["steep"]
    rolling = noise.fbm(
        x / land["roll_length"] + 31, z / land["roll_length"], 4, 0.42, pixel / land["roll_length"]
    )
    ground = land["roll"] * rolling * np.clip(z / 40, 0.1, 1) + land["tilt"] * np.clip(x, -60, 60)
    if land["water"] == "none":
        ground = ground + land["dry"]
        return ground + size * rise * relief(scene, x, z, pixel)
    if land["water"] == "river":
        bank = np.abs(x - wander(scene, z)) - land["wide"] * (1 + 0.25 * rolling)
        valley = smooth(0, 1, bank / (0.30 * z + 60))
        hills = size * rise * relief(scene, x, z, pixel) * valley
        return np.minimum(2 + 0.4 * ground + 2, bank * 0.16) + hills
    wobble = noise.fbm(x / 60 + 5, z / 200, 4, 0.5, pixel / 60)
    shore = land["near"] + land["bend"] * 0.15 * wobble + x * land["tilt"] * 6
    beach = np.minimum((shore - z) * 0.07, 2.0 + ground * 0.2)
    if land["water"] == "lake":
        coast = (
            land["start"] + land["bend"] * noise.fbm(x / 300, z / 900 + 3, 4) + x * land["tilt"] * 3
        )
        far = (z - coast) * 0.06
        size = 0.12 * (land["start"] + 900)
        far = np.where(
            far > 0, far + size * smooth(0, 900, z - coast) * relief(scene, x, z, pixel), far
        )
        return np.maximum(np.maximum(beach, far), -12)
    sea = np.maximum(beach, -25)
    if land["headland"]:
        reach = (x / z / scene.fov - land["side"]) * np.sign(land["side"]) * 5 + 0.45 * wobble
        rock = rise * smooth(0, 1, reach) * (0.25 + relief(scene, x, z, pixel)) * size * 0.7
        sea = np.maximum(sea, np.where(rock > 0.2, rock, -25))
    for u, far, wide in land["islands"]:
        dx, dz = (x - u * far) / (wide * far), (z - far) / (wide * far * 0.8)
        dome = (
            np.exp(-(dx * dx + dz * dz)) * (0.6 + 0.9 * relief(scene, x * 2.0, z * 2.0, pixel * 2))
            - 0.3
        )
        sea = np.maximum(sea, np.where(dome > 0, dome * wide * far * 0.55, -25))
    return sea


@dataclass
class View:
    """What each supersampled pixel (row, column) sees.

    Arrays are (side, side) unless said otherwise.
    """

    side: int
    pixel: float  # width of a pixel as a slope
    u: Array  # slope to the right, (1, side)
    v: Array  # slope up, (side, 1)
    depth: Array  # distance ahead in metres, inf for the sky
    ground: Array  # height of the (dry or drowned) ground
    slope_x: Array
    slope_z: Array
    shadow: Array  # 1 in the sun, 0 in shadow
    heights: Array  # the height field, (depths, columns)
    depths: Array  # (depths,)
    columns: Array  # slopes of the columns, (columns,)


def look_up(view: View, x: Array, z: Array) -> Array:
    """Return the height of the ground or water at world positions, from the grid."""
    col = (x / z - view.columns[0]) / (view.columns[1] - view.columns[0])
    row = np.log(np.maximum(z, view.depths[0]) / view.depths[0]) / np.log(
        view.depths[1] / view.depths[0]
    )
    col = np.clip(col, 0, len(view.columns) - 1.001)
    row = np.clip(row, 0, len(view.depths) - 1.001)
    c, r = col.astype(np.int32), row.astype(np.int32)
    fc, fr = (col - c).astype(np.float32), (row - r).astype(np.float32)
    flat, width = view.heights.ravel(), view.heights.shape[1]
    k = r * width + c
    near = mix(flat.take(k), flat.take(k + 1), fc)
    far = mix(flat.take(k + width), flat.take(k + width + 1), fc)
    return mix(near, far, fr)


def trace_view(scene: Scene, side: int) -> View:
    """Find what every pixel sees.

    The height field is marched front to back, one screen column at a time.
    """
    pixel = scene.fov / side
    u = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5)[None, :] * scene.fov
    v = (scene.horizon - (np.arange(side, dtype=np.float32) + 0.5) / side)[:, None] * scene.fov
    columns = np.linspace(-0.6, 0.6, max(side * 6 // 10, 48), dtype=np.float32) * scene.fov
    nearest = max(0.5 * scene.eye / (scene.fov * (1 - scene.horizon)), 0.8)
    farthest = 9000 if scene.kind == "dunes" else 26000
    depths = np.geomspace(nearest, farthest, max(side * 7 // 4, 256)).astype(np.float32)
    z = depths[:, None]
    fine = z * (columns[1] - columns[0]) * 0.7
    raw = ground_height(scene, columns * z, z + 0 * columns, fine)
    raw = np.where(raw > scene.camera, scene.camera + (raw - scene.camera) * scene.lift, raw)
    grid = np.maximum(raw, 0)
    across = np.interp(u[0], columns, np.arange(len(columns)))
    left = across.astype(int)
    part = (across - left).astype(np.float32)[None, :]
    wide = mix(raw[:, left], raw[:, left + 1], part)
    seen = (np.maximum(wide, 0) - scene.camera) / z
    rising = np.maximum.accumulate(seen, axis=0)
    hit = np.empty((side, side), np.int64)
    upward = v[::-1, 0]
    for i in range(side):
        hit[::-1, i] = np.searchsorted(rising[:, i], upward)
    sky = hit >= len(depths)
    k = np.clip(hit, 1, len(depths) - 1) * side + np.arange(side)[None, :]
    low, high = seen.take(k - side), seen.take(k)
    share = np.clip((v - low) / np.maximum(high - low, 1e-6), 0, 1)
    step = math.log(depths[1] / depths[0])
    depth = (nearest * np.exp((k // side - 1 + share) * step)).astype(np.float32)
    ground = mix(wide.take(k - side), wide.take(k), share)
    level = (ground < 0) & (v < 0)
    depth = np.where(level, scene.camera / np.maximum(-v, 1e-5), depth)
    depth[sky] = np.inf
    gx = np.gradient(wide, axis=1) / (z * pixel)
    gz = np.gradient(wide, axis=0) / (z * step) - u * gx
    lit, slopes = np.ones_like(ground), (gx.take(k), gz.take(k))
    view = View(side, pixel, u, v, depth, ground, *slopes, lit, grid, depths, columns)
    cast_shadows(scene, view)
    return view


def cast_shadows(scene: Scene, view: View) -> None:
    """Darken what lies behind higher ground, seen from the sun.

    A few growing steps give soft edges.
    """
    land = np.isfinite(view.depth)
    z = view.depth[land]
    x, y = (view.u + 0 * view.ground)[land] * z, np.maximum(view.ground[land], 0)
    sx, sy, sz = scene.towards_sun
    clear = np.full(z.shape, 1.0, np.float32)
    for reach in (0.02, 0.05, 0.1, 0.18, 0.3, 0.45):
        far = reach * z
        over = y + far * sy - look_up(view, x + far * sx, np.maximum(z + far * sz, 1.0))
        clear = np.minimum(clear, over / (far * 0.10) + 0.6)
    view.shadow[land] = np.clip(clear, 0, 1)


# --------------------------------------------------------------------------------------------------
# painting


def paint_sky(scene: Scene, u: Array, v: Array, pixel: float, mirrored: bool = False) -> Array:
    """Return the colours (..., 3) of the sky in the directions (u, v).

    A mirrored sky is without sun and moon.
    """
    light = scene.light
    height = np.clip(v, 0, None)[..., None] / 0.55
    colour = mix(light.horizon, light.middle, smooth(0.0, 0.5, height))
    colour = mix(colour, light.zenith, smooth(0.25, 1.25, height))
    distance = np.hypot(u - scene.sun[0], v - scene.sun[1])
    glow = (0.55 * np.exp(-distance / 0.30) + 0.45 * np.exp(-distance / 0.07))[..., None]
    strength = {"storm": 0.1, "night": 0.30, "day": 0.55, "hazy": 0.5}.get(scene.time, 0.85)
    bright = rgb(150, 172, 214) if scene.time == "night" else np.minimum(light.sun * 1.06, 1.1)
    colour = mix(colour, bright, glow * strength)
    if scene.time == "night":
        colour = colour + paint_night(scene, u, v)
    if scene.disc and not mirrored:
        edge = np.clip((scene.disc - distance) / 0.006 + 0.5, 0, 1)[..., None]
        face = np.minimum(light.sun * 1.1 + 0.12, 1.15) * np.ones_like(colour)
        if scene.time == "night":
            spots = scene.noise.fbm(
                (u - scene.sun[0]) / scene.disc, (v - scene.sun[1]) / scene.disc, 3
            )
            face = rgb(246, 244, 228) * (1 - 0.22 * smooth(0.0, 0.5, spots))[..., None]
        colour = mix(colour, face, edge)
    for layer in scene.clouds:
        colour = add_clouds(scene, layer, colour, u, v, glow, pixel)
    return colour


def paint_night(scene: Scene, u: Array, v: Array) -> Array:
    """Return the light (..., 3) of the milky way and of auroras.

    Stars are dots, see `scatter_dots`.
    """
    extras, noise = scene.extras, scene.noise
    glow = np.zeros((*np.broadcast(u, v).shape, 3), np.float32)
    if extras["galaxy"]:
        across = (u * math.cos(extras["galaxy"]) + (v - 0.25) * math.sin(extras["galaxy"])) / 0.09
        dust = 0.65 + 0.7 * noise.fbm(u * 9, v * 9, 5, 0.6)
        glow += (np.exp(-across * across) * dust)[..., None] * rgb(86, 84, 118)
    if extras["aurora"]:
        fold = 0.12 + 0.10 * noise.fbm(u * 2.2 + 2, 0 * v + 0.4, 3)
        rays = 0.55 + 0.45 * noise.fbm(u * 16 + 3 * fold, 0 * v, 3) + 0.3 * noise.fbm(u * 4, v, 2)
        up = v - fold
        curtain = np.where(up > 0, np.exp(-up / 0.13), np.exp(up / 0.012)) * np.clip(rays, 0, 1.3)
        tint = mix(extras["aurora_colour"], rgb(150, 90, 220), smooth(0.08, 0.3, up)[..., None])
        glow += (curtain * extras["aurora"] * 0.75)[..., None] * tint
    return glow


def add_clouds(
    scene: Scene, layer: Cloud, colour: Array, u: Array, v: Array, glow: Array, pixel: float
) -> Array:
    """Return the sky with one layer of clouds, lit from the side of the sun."""
    noise, light = scene.noise, scene.light
    up = np.maximum(v, 0)
    if layer.style == "cumulus":
        # Shrinking towards the horizon in both directions keeps the billows round.
        q = up + 0.11
        px, py = u / q * layer.scale + layer.shift, np.log(q) * layer.scale * 1.7
        fine = layer.scale / q * pixel
    else:  # a flat sheet overhead, seen in perspective
        q = up + 0.07
        px, py = u / q * layer.scale * 0.6 + layer.shift, 0.75 / q * layer.scale
        fine = layer.scale * 0.6 / q * pixel
    if layer.style == "wisps":
        bent = noise.fbm(px * 0.5, py * 0.5, 2)
        px, py = px * 0.7 + bent * 0.7, py * 1.5 - bent
    body = noise.fbm(px, py, 6, 0.52, fine)
    soft = {"cumulus": 0.30, "wisps": 0.9, "deck": 0.55}[layer.style]
    thick = body + layer.cover
    alpha = smooth(0, soft, thick) * layer.opacity * smooth(-0.01, 0.07, v)
    # The side towards the sun has thinner cloud in front of it.
    dx, dy = scene.sun[0] - u, scene.sun[1] + 0.10 - v
    length = np.hypot(dx, dy) + 0.05
    ahead = noise.fbm(px + 0.28 * dx / length, py + 0.28 * dy / length, 4, 0.52, fine)
    lit = np.clip(0.62 + 1.0 * (body - ahead) - 0.28 * np.clip(thick, 0, 1), 0, 1)[..., None]
    if layer.style == "deck":
        lit = np.clip(lit * 0.85 + 0.1 - 0.25 * np.clip(thick[..., None] - 0.4, -0.3, 1), 0, 1)
    tone = mix(light.shade, light.cloud, lit)
    tone = mix(
        tone, np.minimum(light.sun * 1.05, 1.1), glow * 0.6 * (scene.time not in ("night", "storm"))
    )
    tone = mix(tone, light.horizon, 0.45 * np.exp(-up / 0.10)[..., None])
    return mix(colour, tone, alpha[..., None])


def air_colour(scene: Scene, u: Array) -> Array:
    """Return the colour (n, 3) that distance fades to, warmer towards a low sun."""
    light = scene.light
    haze = mix(light.horizon, light.middle, 0.35)
    share = 0 if scene.time in ("night", "storm") else 0.35
    near_sun = np.exp(-np.abs(u - scene.sun[0]) / 0.35)[:, None] * share
    return mix(haze, np.minimum(light.sun, 1.0) * 0.95, near_sun)


def veil(scene: Scene, colour: Array, u: Array, y: Array, z: Array) -> Array:
    """Return the colours (n, 3) behind the air between them and the eye."""
    fog = 1 - np.exp(-((z / scene.extras["sight"]) ** 0.9))
    if scene.extras["mist"]:
        pool = np.exp(-np.maximum(y, 0) / scene.extras["mist_height"]) * smooth(40, 900, z)
        wisps = np.clip(0.75 + 0.5 * scene.noise.fbm(u * 3, y / 25 + np.log(z), 3), 0.2, 1)
        fog = 1 - (1 - fog) * (1 - 0.8 * scene.extras["mist"] * pool * wisps)
    return mix(colour, air_colour(scene, u), np.clip(fog, 0, 0.96)[:, None])


def plough_fields(scene: Scene, x: Array, z: Array, pixel: Array) -> tuple[Array, Array]:
    """Return colours (n, 3) of a patchwork of fields and the share (n,) of hedges between them."""
    turn, noise = scene.extras["field_angle"], scene.noise
    bent = noise.fbm(x / 400, z / 400, 2) * 40
    a = (x * math.cos(turn) + z * math.sin(turn) + bent) / 70
    b = (z * math.cos(turn) - x * math.sin(turn) - bent) / 150
    a = a + 0.37 * np.floor(b)
    pick_one = (
        np.floor(a).astype(np.int64) * 73856093 ^ np.floor(b).astype(np.int64) * 19349663
    ) % 6
    biome = scene.biome
    crops = [biome.grass, biome.meadow, biome.grass * 0.8, mix(biome.meadow, rgb(120, 94, 70), 0.5)]
    crops += [mix(biome.grass, rgb(214, 190, 104), 0.55), mix(biome.meadow, rgb(80, 128, 60), 0.6)]
    colour = np.array(crops, np.float32)[pick_one]
    rows = np.sin(a * 70 * 2.1) * np.clip(1.5 - pixel / 0.9, 0, 1)
    edge = np.minimum(np.abs(a - np.round(a)) * 70, np.abs(b - np.round(b)) * 150)
    return colour * (1 + 0.10 * rows)[:, None], np.clip(1.5 - edge / (2 + pixel), 0, 1) * 0.55


@dataclass
class Ground:
    """What the pixels that show land see; all arrays are (n,)."""

    u: Array
    x: Array
    y: Array
    z: Array
    slope_x: Array
    slope_z: Array
    flat: Array  # 1 level, 0 upright
    pixel: Array  # metres a pixel spans
    broad: Array  # noise of about 100 m
    tufts: Array  # noise below 1 m
    patch: Array  # noise of about 400 m


def paint_land(scene: Scene, view: View, colour: Array) -> None:
    """Paint the ground into colour (side, side, 3).

    Cover by slope and altitude, sun and shadow, air.
    """
    land = np.isfinite(view.depth) & ~is_water(view)
    if not land.any():
        return
    z, y, u = view.depth[land], view.ground[land], (view.u + 0 * view.ground)[land]
    x, gx, gz = u * z, view.slope_x[land], view.slope_z[land]
    # Seen at a grazing angle a pixel covers more ground ahead than sideways; noise is faded by
    # their mean.
    grazing = np.clip(scene.camera - y, 1, None) / z + np.hypot(gx, gz) * 0.5
    pixel = z * view.pixel / np.sqrt(np.clip(grazing, 0.02, 1))
    broad = scene.noise.fbm(x / 110, z / 110, 6, 0.6, pixel / 110)
    tufts = scene.noise.fbm(x / 0.9 + 50, z / 0.9, 5, 0.85, pixel / 0.9)
    patch = scene.noise.fbm(x / 420 + 9, z / 420 + 4, 4, 0.5, pixel / 420)
    flat = 1 / np.sqrt(1 + gx * gx + gz * gz)
    ground = Ground(u, x, y, z, gx, gz, flat, pixel, broad, tufts, patch)
    tone = lay_rock(scene, ground, lay_meadows(scene, ground))
    tone, snow = lay_snow(scene, ground, tone)
    ambient = (
        scene.light.ambient * (0.72 + 0.28 * flat)[:, None] * mix(1, np.array([0.95, 1, 1.1]), snow)
    )
    lit = tone * (
        ambient + scene.light.sun * find_sunshine(scene, ground, view.shadow[land])[:, None]
    )
    colour[land] = veil(scene, lit.astype(np.float32), u, y, z)


def lay_meadows(scene: Scene, at: Ground) -> Array:
    """Return the colours (n, 3) of grass or sand, with fields, a path, flowers and woods."""
    biome, extras, noise, x, z = scene.biome, scene.extras, scene.noise, at.x, at.z
    tone = mix(biome.grass, biome.meadow, smooth(-0.25, 0.35, at.patch + 0.35 * at.broad)[:, None])
    if extras["fields"]:
        crops, hedge = plough_fields(scene, x, z, at.pixel)
        level = smooth(0.05, 0.015, 1 - at.flat)[:, None]
        tone = mix(tone, mix(crops, biome.tree, hedge[:, None]), 0.95 * level)
    if scene.land["water"] != "none":
        tone = mix(extras["sand"], tone, smooth(1.2, 3.5, at.y + at.broad)[:, None])
    if scene.land["path"]:
        off = np.abs(x - wander(scene, z)) - scene.land["path"] * (1 + 0.3 * at.tufts)
        track = np.clip(0.5 - off / (0.5 + at.pixel), 0, 1) * (z < 900) * 0.85
        tone = mix(tone, mix(rgb(186, 158, 122), extras["sand"], 0.3), track[:, None])
    if extras["flowers"]:
        dots = noise.value(x / 0.45, z / 0.45) * np.clip(1.6 - at.pixel / 0.5, 0, 1)
        bloom = (
            smooth(-0.1, 0.4, noise.fbm(x / 30 + 3, z / 30, 3))
            * np.exp(-z / 250)
            * extras["flowers"]
        )
        tone = mix(tone, extras["flower"], (bloom * np.clip(0.35 + 1.3 * dots, 0, 1))[:, None])
    if biome.wooded and scene.kind != "plain":
        wood = noise.fbm(x / 260 + 3.1, z / 260, 4, 0.55, at.pixel / 260) + biome.wooded - 0.45
        wood = smooth(0, 0.22, wood - 1.1 * at.y / scene.peak + 0.2 * at.broad) * smooth(
            120, 420, z
        )
        crowns = 0.82 + 0.5 * noise.fbm(x / 14, z / 14, 3, 0.7, at.pixel / 14)
        tone = mix(tone, biome.tree * crowns[:, None], (wood * 0.92)[:, None])
    return tone


def lay_rock(scene: Scene, at: Ground, tone: Array) -> Array:
    """Return the colours (n, 3) with rock on steep and high ground.

    It lies in strata on mesas, and has a fine texture.
    """
    rock, style = scene.biome.rock * (1 + 0.22 * at.broad)[:, None], scene.land["style"]
    if style == "mesa":
        strata = scene.noise.fbm(at.y / (0.10 * scene.peak) + 0.15 * at.patch, 0 * at.y + 3, 4, 0.7)
        rock = scene.biome.rock * (
            1 + 0.35 * strata[:, None] * np.array([0.8, 1.0, 1.1], np.float32)
        )
    start = {"alpine": 0.16, "mesa": 0.12, "dune": 9.0, "round": 0.3}[style]
    steep = 1 - at.flat + 0.10 * at.broad + 0.12 * at.y / scene.peak
    tone = mix(tone, rock, smooth(start, start + 0.16, steep)[:, None])
    beach = (scene.land["water"] != "none") & (at.y < 3)
    rough = 0.08 if scene.kind == "dunes" else np.where(beach, 0.14, 0.24)
    return tone * (1 + rough * at.tufts + 0.10 * at.broad)[:, None]


def lay_snow(scene: Scene, at: Ground, tone: Array) -> tuple[Array, Array]:
    """Return the colours (n, 3) with snow where it is high and not steep.

    The share of snow (n, 1) is returned, too.
    """
    line = scene.extras.get("snowline", 9.0)
    snow = smooth(line - 0.06, line + 0.10, at.y / scene.peak + 0.16 * at.broad)
    snow = (snow * smooth(0.52, 0.66, at.flat + 0.12 * at.broad))[:, None]
    white = rgb(226, 232, 242) * (1 + 0.05 * at.tufts + 0.06 * at.broad)[:, None]
    return mix(tone, white, snow), snow


def find_sunshine(scene: Scene, at: Ground, shadow: Array) -> Array:
    """Return how much direct light (n,) falls on the ground, from 0 to 1.3."""
    noise, (sx, sy, sz) = scene.noise, scene.towards_sun
    # The difference of noise here and a little towards the sun is the light on bumps too small for
    # the grid.
    bump = at.broad - noise.fbm(at.x / 45 + 0.5 * sx, at.z / 45 + 0.5 * sz, 5, 0.62, at.pixel / 45)
    facing = sy - at.slope_x * sx - at.slope_z * sz
    light = np.clip(facing * at.flat * 1.02 + 0.22 * bump * (1.6 - at.flat), 0, 1.3)
    if scene.clouds and scene.time != "night":
        drift = noise.fbm(at.x / 500 + 70, at.z / 900, 3, 0.5, at.pixel / 500)
        light = light * (0.45 + 0.55 * smooth(-0.25, 0.15, drift + scene.extras["gaps"]))
    if scene.kind == "dunes":  # wind ripples across the slope
        phase = at.x * 0.5 + at.z + 6 * noise.fbm(at.x / 9, at.z / 9, 2)
        light = np.clip(
            light + 0.10 * np.sin(5 * phase) * np.clip(1.2 - at.pixel / 0.5, 0, 1), 0, 1.3
        )
    return light * shadow


def is_water(view: View) -> Array:
    """Return a mask (side, side) of the pixels that show water."""
    return (view.ground < 0) & (view.v < 0) & np.isfinite(view.depth)


def paint_water(scene: Scene, view: View, colour: Array, cover: Array) -> None:
    """Paint lakes, rivers and seas.

    They are the mirrored picture, broken by waves, over the colour of the depth.
    """
    water = is_water(view) & (cover < 0.99)
    if not water.any():
        return
    rows, cols = np.nonzero(water)
    z, u, v = view.depth[water], view.u[0, cols], view.v[rows, 0]
    x, depth, light = u * z, -view.ground[water], scene.light
    noise, extras, sea = scene.noise, scene.extras, scene.kind == "sea"
    pixel = z * view.pixel / np.sqrt(np.clip(-v, 0.03, 1))
    length = 26.0 if sea else 9.0
    wave = noise.fbm(x / length * 0.55, z / length, 8, 0.74, pixel / length)
    swell = noise.fbm(x / 300, z / 900 * 4, 3, 0.5)
    rough = (0.10 if sea else 0.035) * extras["wave"]
    tilt = wave * rough
    up, across = np.abs(-v + tilt * (0.35 + 1.2 * -v)), u + 0.5 * tilt
    mirror = paint_sky(scene, across, np.maximum(up, 0.004), view.pixel * 2, mirrored=True)
    # Land and trees: look at the mirrored row of the picture, if what is there stands behind this
    # water.
    row = ((scene.horizon - up / scene.fov) * view.side).astype(int)
    col = np.clip((across / scene.fov + 0.5) * view.side, 0, view.side - 1).astype(int)
    inside, row = row >= 0, np.maximum(row, 0)
    there = np.where(is_water(view), np.inf, view.depth)[row, col]
    behind = inside & (there > z * 1.02) & np.isfinite(there)
    mirror = np.where(behind[:, None], colour[row, col] * 0.94, mirror)
    tint = mix(
        extras["shallow"], extras["deep"], (1 - np.exp(-depth / (3.5 if sea else 1.5)))[:, None]
    )
    body = (
        tint * (light.ambient * 1.3 + light.sun * 0.45) * (1 + 0.16 * wave + 0.1 * swell)[:, None]
    )
    shine = np.clip(0.22 + 0.75 * np.exp(v / (0.16 if sea else 0.30)) - 1.5 * tilt, 0.1, 0.95)
    result = mix(body, mirror, shine[:, None])
    if scene.time != "storm":
        width = 0.025 + 0.30 * -v * (0.4 + extras["wave"])
        lane = np.exp(-(((u - scene.sun[0]) / width) ** 2)) * (scene.disc > 0)
        sparkle = smooth(0.05, 0.55, wave + 0.15)
        power = {"night": 0.7, "day": 0.5}.get(scene.time, 0.9)
        colour_of_light = (
            rgb(214, 222, 236) if scene.time == "night" else np.minimum(light.sun * 1.1, 1.15)
        )
        result = mix(result, colour_of_light, (lane * (0.22 + 0.78 * sparkle) * power)[:, None])
    white = light.ambient * 0.9 + light.sun * 0.65
    if sea:
        first = np.exp(-(((depth - 0.22 - 0.14 * wave) / 0.16) ** 2))
        surf = first + 0.6 * np.exp(-(((depth - 1.1 - 0.5 * wave) / 0.12) ** 2))
        surf = np.clip(surf * (0.8 + 0.8 * wave), 0, 1) * smooth(1500, 200, z)
        caps = smooth(0.62, 0.95, wave + 0.25 * swell) * (extras["wave"] > 0.7) * 0.55
        result = mix(result, white, np.clip(surf + caps, 0, 0.92)[:, None])
    result = veil(scene, result.astype(np.float32), u, 0 * z, z * 0.8)
    colour[water] = mix(result, colour[water], cover[water][:, None])


# --------------------------------------------------------------------------------------------------
# plants


Parts = tuple[Array, Array, Array]


def conifer(x: Array, y: Array, rng: np.random.Generator, noise: Noise, sun: float) -> Parts:
    """Return (cover, light, top) of a fir, each 0..1; x, y in heights from its foot.

    `top` is 1 where snow would lie and -1 on bark; all plants below answer alike.
    """
    tiers, offset = rng.uniform(7, 11), rng.uniform(0, 50)
    ragged = noise.fbm(x * 14 + offset, y * 18, 3, 0.6)
    branch = (y + 0.35 * np.abs(x) + 0.012 * ragged) * tiers
    tier = branch - np.floor(branch)
    left = np.clip(1 - y, 0, 1)
    width = left**0.85 * rng.uniform(0.17, 0.25) * (1 - 0.42 * tier) + 0.022 * ragged * left
    inside = (width - np.abs(x)) / 0.012 + 0.5
    cover = np.clip(inside, 0, 1) * smooth(0.05, 0.09, y) * (y < 1)
    trunk = np.clip((0.016 - np.abs(x)) / 0.008 + 0.5, 0, 1) * (y > -0.02) * (y < 0.3)
    side = x / np.maximum(width, 0.02) * sun
    light = np.clip(0.42 + 0.3 * side + 0.4 * (tier - 0.45) + 0.25 * ragged, 0, 1)
    light = light * np.where(cover > 0.3, 1, 0.4)
    top = np.where(cover < 0.3, -1, cover * smooth(0.3, 0.75, tier + 0.5 * ragged))
    return np.maximum(cover, trunk), light, top


def blobs(
    x: Array, y: Array, rng: np.random.Generator, noise: Noise, sun: float, shape: str
) -> Parts:
    """Return (cover, light, top) of a crown made of balls: trees, poplars, bushes, boulders."""
    count, wide, low, high, size = {
        "broad": (16, 0.25, 0.42, 0.82, 0.15),
        "poplar": (26, 0.05, 0.14, 0.90, 0.085),
        "bush": (9, 0.50, 0.15, 0.55, 0.34),
        "boulder": (3, 0.45, 0.05, 0.30, 0.75),
    }[shape]
    t = (np.arange(count) + rng.uniform(0, 1, count)) / count
    bulge = np.sqrt(np.clip(1 - (2 * t - 0.9) ** 2 * 0.9, 0.05, 1))
    bx, by = rng.uniform(-1, 1, count) * wide * bulge, low + (high - low) * t
    radius = size * rng.uniform(0.7, 1.15, count) * (0.75 + 0.35 * bulge)
    offset = rng.uniform(0, 50)
    grain = 3.5 if shape == "boulder" else 11
    leaf = noise.fbm(x * grain + offset, y * grain, 4, 0.6 if shape == "boulder" else 0.7)
    dx = ((x[None] - bx[:, None, None]) / radius[:, None, None]).astype(np.float32)
    dy = ((y[None] - by[:, None, None]) / radius[:, None, None]).astype(np.float32)
    rag = 0.25 if shape == "boulder" else 0.42
    front = 1 - dx * dx - dy * dy + rag * leaf[None]
    best = front.argmax(0)[None]
    front, dx, dy = (np.take_along_axis(a, best, 0)[0] for a in (front, dx, dy))
    cover = np.clip(front / 0.25, 0, 1) * (y > 0)
    if shape == "boulder":  # flat facets instead of leaves
        dy, dx = (mix(d, np.round(d * 1.6 + leaf) / 1.6, 0.5) for d in (dy, dx))
        leaf = 0.5 * leaf
    light = np.clip(0.40 + 0.32 * dy + 0.30 * dx * sun + 0.22 * leaf + 0.25 * (y - 0.5), 0, 1)
    top = cover * smooth(0.2, 0.8, dy)
    if shape in ("broad", "poplar"):
        bend = 0.02 * np.sin(y * 7 + offset)
        trunk = (
            np.clip((0.028 - 0.02 * y - np.abs(x - bend)) / 0.010 + 0.5, 0, 1)
            * (y > -0.02)
            * (y < high)
        )
        top = np.where(cover < 0.5, -1, top)
        light = np.where(cover < 0.5, 0.32, light)
        cover = np.maximum(cover, trunk)
    return cover, light, top


def palm(x: Array, y: Array, rng: np.random.Generator, noise: Noise, sun: float) -> Parts:
    """Return (cover, light, top) of a palm: a leaning trunk and hanging fronds."""
    lean = rng.uniform(-0.2, 0.2)
    middle = lean * y * y
    cover = (
        np.clip((0.022 - 0.008 * y - np.abs(x - middle)) / 0.008 + 0.5, 0, 1)
        * (y > -0.02)
        * (y < 0.83)
    )
    light = 0.45 + 0.2 * sun * (x - middle) / 0.02 + 0.1 * np.sin(y * 150)
    bark = -1.0 + 0 * x
    cx, cy = x - lean * 0.69, y - 0.83
    for angle in np.linspace(-0.35, math.pi + 0.35, 9) + rng.uniform(-0.12, 0.12, 9):
        along = cx * math.cos(angle) + cy * math.sin(angle)
        off = cy * math.cos(angle) - cx * math.sin(angle)
        droop = off + np.sign(math.cos(angle)) * 1.5 * along * along
        teeth = 0.85 + 0.2 * np.sin(along * 90 + angle * 9)
        frond = np.clip(
            (0.030 * teeth * np.clip(along / 0.05, 0, 1) - np.abs(droop)) / 0.010 + 0.3, 0, 1
        )
        frond = frond * (along > 0) * (along < 0.27)
        light = mix(light, np.clip(0.45 + 0.3 * math.cos(angle) * sun - droop * 6, 0, 1), frond)
        bark = mix(bark, 0.0, frond)
        cover = np.maximum(cover, frond)
    return cover, np.clip(light, 0, 1), bark


def cactus(x: Array, y: Array, rng: np.random.Generator, noise: Noise, sun: float) -> Parts:
    """Return (cover, light, top) of a saguaro with two arms."""
    bars = [(0.0, 0.0, 0.0, 0.94, 0.06)]  # from (x, y) to (x, y), radius
    for side in (-0.17, 0.17):
        elbow, tip = rng.uniform(0.3, 0.5), rng.uniform(0.65, 0.85)
        bars += [(min(side, 0), elbow, max(side, 0), elbow, 0.045), (side, elbow, side, tip, 0.045)]
    inside = np.full(x.shape, -1.0, np.float32)
    for x0, y0, x1, y1, radius in bars:
        inside = np.maximum(
            inside, radius - np.hypot(x - np.clip(x, x0, x1), y - np.clip(y, y0, y1))
        )
    light = np.clip(0.4 + x * sun * 2 + 0.1 * np.sin(x * 160), 0, 0.7)
    return np.clip(inside / 0.012 + 0.5, 0, 1), light, 0 * x


def paint_plants(scene: Scene, view: View, colour: Array, cover: Array) -> None:
    """Paint the plants, far ones first, where nothing nearer hides them.

    Their masks are added to cover.
    """
    side, light = view.side, scene.light
    sun = float(np.sign(scene.towards_sun[0])) * (0.6 if scene.sun_ahead else 1.0)
    snowy = scene.extras.get("snowline", 1) < 0.2
    strength = light.sun * (0.75 if scene.sun_ahead else 1.1)
    for plant in sorted(scene.plants, key=lambda p: -p.z):
        foot = float(look_up(view, np.array([plant.x]), np.array([plant.z]))[0])
        if foot < 0.25 or foot > 0.62 * scene.peak + 25:
            continue  # in the water or above the tree line
        scale = side / (scene.fov * plant.z)  # pixels per metre
        tall = plant.height * scale
        cx = (plant.x / plant.z / scene.fov + 0.5) * side
        base = (scene.horizon - (foot - scene.camera) / plant.z / scene.fov) * side
        half = tall * (1.1 if plant.shape in ("bush", "boulder") else 0.5)
        x0, x1 = max(int(cx - half), 0), min(int(cx + half) + 2, side)
        y0, y1 = max(int(base - tall * 1.06), 0), min(int(base + 0.03 * tall) + 2, side)
        if tall < 1.2 or x0 >= x1 or y0 >= y1 or tall > 2.2 * side:
            continue
        x = ((np.arange(x0, x1, dtype=np.float32) + 0.5 - cx) / tall)[None, :]
        y = ((base - np.arange(y0, y1, dtype=np.float32) - 0.5) / tall)[:, None]
        x, y = np.broadcast_arrays(x, y)
        rng = np.random.default_rng(plant.detail)
        makers = {"conifer": conifer, "palm": palm, "cactus": cactus}
        make = makers.get(plant.shape, partial(blobs, shape=plant.shape))
        mask, lit, top = make(x, y, rng, scene.noise, sun)
        window = (slice(y0, y1), slice(x0, x1))
        if tall > 12:
            shade_ground(scene, view, colour, plant, cx + sun * -0.2 * tall, base, tall)
        mask = mask * (view.depth[window] > plant.z * 0.97)
        leaves = mix(plant.colour, rgb(104, 84, 66), np.clip(-top, 0, 1)[..., None])
        tone = leaves * (
            light.ambient * (0.45 + 0.6 * lit[..., None]) + strength * (lit**1.5)[..., None]
        )
        if snowy:
            white = rgb(238, 243, 250) * (light.ambient * 1.05 + strength * 0.6 * lit[..., None])
            tone = mix(tone, white, np.clip(top * 0.85, 0, 1)[..., None])
        flat = np.float32(tone).reshape(-1, 3)
        u = np.full(len(flat), plant.x / plant.z, np.float32)
        tone = veil(scene, flat, u, 0 * u + foot + plant.height * 0.5, 0 * u + plant.z).reshape(
            tone.shape
        )
        colour[window] = mix(colour[window], tone, mask[..., None])
        cover[window] = np.maximum(cover[window], mask)
        view.depth[window] = np.where(mask > 0.5, plant.z, view.depth[window])


def shade_ground(
    scene: Scene, view: View, colour: Array, plant: Plant, cx: float, base: float, tall: float
) -> None:
    """Darken the ground around the foot of a plant, on the side away from the sun."""
    wide = tall * (0.6 if plant.shape in ("bush", "boulder") else 0.32)
    deep = wide * min(0.35, 1.6 * scene.camera / plant.z)
    x = np.arange(max(int(cx - wide), 0), min(int(cx + wide) + 1, view.side))
    y = np.arange(max(int(base - deep), 0), min(int(base + deep) + 1, view.side))
    if len(x) and len(y):
        window = (slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1))
        gap = ((x[None, :] - cx) / wide) ** 2 + ((y[:, None] - base) / max(deep, 1)) ** 2
        near = np.abs(view.depth[window] / plant.z - 1) < 0.4
        colour[window] *= (1 - 0.42 * np.clip(1 - gap, 0, 1) * near)[..., None].astype(np.float32)


def scatter_dots(colour: Array, spots: Array, radius: float, tone: Array, room: Array) -> None:
    """Add soft dots at spots (n, 3: x, y, size in 0..1) where room (side, side) is 1.

    Dots are stars and snow flakes.
    """
    side = colour.shape[0]
    sigma = max(radius * side, 0.7)  # never finer than a pixel; then dimmer instead
    dim = min(1.0, (radius * side / sigma) ** 2 * 1.5 + 0.25)
    reach = int(sigma * 2.5) + 1
    for x, y, size in spots:
        cx, cy = x * side, y * side
        xs = np.arange(max(int(cx) - reach, 0), min(int(cx) + reach + 1, side))
        ys = np.arange(max(int(cy) - reach, 0), min(int(cy) + reach + 1, side))
        gap = (xs[None, :] + 0.5 - cx) ** 2 + (ys[:, None] + 0.5 - cy) ** 2
        window = (slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1))
        glow = (
            np.exp(-gap / (2 * (sigma * (0.6 + 0.6 * size)) ** 2)) * (0.25 + 0.75 * size**3) * dim
        )
        colour[window] = mix(colour[window], tone, (glow * room[window])[..., None])


def grade(scene: Scene, colour: Array) -> Array:
    """Return the finished picture (side, side, 3) in 0..1: exposure, contrast, saturation."""
    extras = scene.extras
    colour = np.clip(colour, 0, 1.25) * extras["exposure"]
    mean = float(colour.mean())
    # A camera would choose its exposure: keep nights readable and snow fields below white.
    colour = colour * (np.clip(mean, 0.33, 0.62) / mean) ** 0.85
    gray = colour.mean(-1, keepdims=True)
    if scene.time == "night":  # eyes see little colour by moonlight
        colour = mix(colour, gray * np.array([0.6, 0.9, 1.6], np.float32), 0.2)
    colour = np.clip(gray + (colour - gray) * extras["saturation"], 0, None)
    # soft highlights
    colour = np.where(colour > 0.8, 0.8 + 0.2 * np.tanh((colour - 0.8) / 0.2), colour)
    colour = mix(colour, colour * colour * (3 - 2 * colour), extras["contrast"])
    spread = float(colour.mean(-1).std())
    if spread < 0.13:
        middle = colour.mean((0, 1))
        colour = middle + (colour - middle) * min(0.13 / max(spread, 0.02), 1.8)
    return np.clip(colour, 0, 1)


def paint(seed: int, size: int) -> Image.Image:
    """Return the landscape of this seed as a square RGB image of size x size pixels."""
    scene = plan_scene(seed)
    side = size * (2 if size <= 1024 else 1)
    view = trace_view(scene, side)
    sky = ~np.isfinite(view.depth)
    rows, cols = np.nonzero(sky)
    colour = np.zeros((side, side, 3), np.float32)
    colour[sky] = paint_sky(scene, view.u[0, cols], view.v[rows, 0], view.pixel)
    if scene.time == "night":
        room = sky * smooth(0.0, 0.2, view.v)
        scatter_dots(colour, scene.extras["stars"], 0.0016, rgb(236, 240, 255), room)
    paint_land(scene, view, colour)
    cover = np.zeros((side, side), np.float32)
    paint_plants(scene, view, colour, cover)
    paint_water(scene, view, colour, cover)
    if len(scene.extras["flakes"]):
        tone = rgb(250, 252, 255) * np.minimum(scene.light.ambient * 1.3 + 0.25, 1)
        scatter_dots(colour, scene.extras["flakes"], 0.004, tone, np.ones((side, side)))
    picture = Image.fromarray((grade(scene, colour) * 255 + 0.5).astype(np.uint8))
    return picture.resize((size, size), Image.Resampling.LANCZOS) if side != size else picture


# --------------------------------------------------------------------------------------------------
# command line


def write_picture(seed: int, size: int, folder: Path) -> int:
    """Paint one picture into the folder, replacing it in one step; return its size in bytes."""
    buffer = io.BytesIO()
    paint(seed, size).save(buffer, "JPEG", **JPEG)
    target = folder / f"landscape_{seed:06d}.jpg"
    unfinished = target.with_suffix(f".{os.getpid()}.part")
    try:
        unfinished.write_bytes(buffer.getvalue())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(buffer.getvalue())


def whole_number(low: int, high: int | None = None):
    """Return an argparse type for whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, got {text!r}")
        return number

    return parse


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    program = "python datasets/paint_landscapes.py"
    more = "--count=1000 --size=256 --first_seed=4096 --folder=more"
    parser = OneLineParser(
        description="Paint synthetic landscapes as JPEG files, one per seed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n  {program}\n  {program} {more}",
    )
    add = parser.add_argument
    add("--count", type=whole_number(1), default=4096, help="How many pictures to paint (4096).")
    add(
        "--size",
        type=whole_number(16, 2048),
        default=96,
        help="Their width and height in pixels (96).",
    )
    add(
        "--first_seed",
        type=whole_number(0),
        default=0,
        help="Seed of the first picture (0); the rest follow.",
    )
    add(
        "--folder",
        type=Path,
        default=FOLDER,
        help="Where to write them (landscapes beside this script).",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Paint what the command line asks for; return the exit status."""
    options = parse_arguments()
    seeds = range(options.first_seed, options.first_seed + options.count)
    work = partial(write_picture, size=options.size, folder=options.folder)
    workers = min(os.cpu_count() or 1, options.count, 61)  # Windows takes no more than 61
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(workers) as pool:
            sizes = list(
                tqdm(pool.map(work, seeds, chunksize=4), total=options.count, unit="picture")
            )
    except OSError as problem:
        print(f"error: cannot write to {options.folder}: {problem.strerror}", file=sys.stderr)
        return 2
    print(f"Painted {len(sizes)} pictures, {sum(sizes):,} bytes, into {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
