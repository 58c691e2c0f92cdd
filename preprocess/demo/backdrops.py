"""Backgrounds of the demonstration portraits: simple, soft, a little out of focus."""

from __future__ import annotations

import numpy as np

from preprocess.demo.scene import Scene, blur, rgb


def _noise(scene: Scene, seed: int, cells: float) -> np.ndarray:
    """Smooth noise in about [-1, 1] with `cells` bumps across the unit; the same for the same seed."""
    rng = np.random.default_rng(seed)
    total = np.zeros((scene.height, scene.width), np.float32)
    for _ in range(6):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        k = 2 * np.pi * cells * rng.uniform(0.6, 1.4) / scene.unit
        total += np.sin(k * (np.cos(angle) * scene.x + np.sin(angle) * scene.y) + phase)
    return total / 3


def _soft(value: np.ndarray, width: float) -> np.ndarray:
    return np.clip(value / width + 0.5, 0, 1)


def _box(scene: Scene, x: float, y: float, w: float, h: float) -> np.ndarray:
    """Mask of an upright rectangle around (x, y) with half sides w, h, pixels."""
    return scene.polygon([(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)])


def _fill(scene: Scene, albedo: np.ndarray, height: np.ndarray | None = None) -> None:
    """Covers the whole picture."""
    ones = np.ones((scene.height, scene.width), np.float32)
    albedo = np.broadcast_to(albedo, scene.albedo.shape).astype(np.float32)
    scene.paint(ones, albedo, np.zeros_like(ones) if height is None else height.astype(np.float32))


def brick_wall(scene: Scene) -> None:
    s = scene.unit
    row_height, length, joint = 0.095 * s, 0.235 * s, 0.014 * s
    row = np.floor(scene.y / row_height)
    x = scene.x / length + 0.5 * (row % 2)
    fx, fy = (x % 1) * length, scene.y % row_height
    edge = np.minimum(np.minimum(fx, length - fx), np.minimum(fy, row_height - fy))
    brick = _soft(edge - joint / 2, 0.01 * s)
    tone = np.sin(12.9 * row + 78.2 * np.floor(x))
    albedo = rgb("#8d8075") + brick[..., None] * (rgb("#9c6a57") * (1 + 0.22 * tone[..., None]) - rgb("#8d8075"))
    _fill(scene, albedo, 0.006 * s * brick)


def plain_wall(scene: Scene) -> None:
    s = scene.unit
    _fill(scene, rgb("#6f9a94") * (1 + 0.06 * _noise(scene, 3, 3)[..., None]))
    for x, y, w, h, colour in ((0.20, 0.24, 0.12, 0.15, "#b99a62"), (0.82, 0.22, 0.10, 0.12, "#a8705c")):
        x, y = x * scene.width, y * scene.height
        frame = _box(scene, x, y, w * s, h * s)
        scene.cast(frame, 0.015 * s)
        scene.paint(frame, rgb("#5a483c"), 0.016 * s * blur(frame, 0.008 * s))
        scene.paint(_box(scene, x, y, 0.82 * w * s, 0.82 * h * s), rgb("#c9c0ae"))
        scene.paint(_box(scene, x, y, 0.6 * w * s, 0.6 * h * s), rgb(colour))


def window(scene: Scene) -> None:
    s = scene.unit
    _fill(scene, rgb("#9c8f86") * (1 + 0.04 * _noise(scene, 5, 2)[..., None]))
    x, y, w, h = 0.5 * scene.width, 0.40 * scene.height, 0.36 * scene.width, 0.36 * scene.height
    frame = _box(scene, x, y, w + 0.03 * s, h + 0.03 * s)
    scene.paint(frame, rgb("#d2cabd"), 0.02 * s * blur(frame, 0.01 * s))
    sky = np.clip((scene.y - y + h) / (2 * h), 0, 1)[..., None]
    view = rgb("#8ca6bb") + sky * (rgb("#cbcfc6") - rgb("#8ca6bb"))
    hill = _soft(scene.y - y - 0.45 * h - 0.08 * s * np.sin(scene.x / (0.13 * s)), 0.03 * s)[..., None]
    scene.paint(_box(scene, x, y, w, h), view + hill * (rgb("#6b8a62") - view))
    bars = np.maximum(_box(scene, x, y, 0.012 * s, h), _box(scene, x, y, w, 0.012 * s))
    scene.paint(bars, rgb("#d2cabd"), 0.01 * s * blur(bars, 0.006 * s))


def bookshelf(scene: Scene) -> None:
    s = scene.unit
    palette = [rgb(c) for c in ("#96594e", "#56748a", "#a98b58", "#6d8763", "#84647a", "#b09c82", "#5f6274")]
    albedo = np.broadcast_to(rgb("#584639"), scene.albedo.shape).copy()
    height = np.zeros((scene.height, scene.width), np.float32)
    rng = np.random.default_rng(11)
    shelf = 0.34 * s
    for row in range(-1, int(scene.height / shelf) + 1):
        base = (row + 0.80) * shelf
        x = -0.02 * s
        while x < scene.width:
            w, h = rng.uniform(0.06, 0.10) * s, rng.uniform(0.24, 0.30) * s
            inside = _box(scene, x + w / 2, base - h / 2, w / 2, h / 2)
            colour = palette[rng.integers(len(palette))] * rng.uniform(0.9, 1.12)
            albedo += inside[..., None] * (colour - albedo)
            across = np.clip(1 - ((scene.x - x - w / 2) / (w / 2)) ** 2, 0, 1)
            height = np.maximum(height, inside * np.sqrt(across) * 0.012 * s)
            x += w + (rng.uniform(0.0, 0.06) * s if rng.uniform() < 0.12 else 0.002 * s)
        board = _soft(0.014 * s - np.abs(scene.y - base - 0.014 * s), 0.006 * s)
        albedo += board[..., None] * (rgb("#8a6a50") - albedo)
    _fill(scene, albedo, height)


def sea(scene: Scene) -> None:
    s = scene.unit
    horizon = 0.46 * scene.height
    t = np.clip(scene.y / horizon, 0, 1)[..., None]
    sky = rgb("#7ba4c6") + t * (rgb("#d6d6cb") - rgb("#7ba4c6"))
    cloud = np.clip(_noise(scene, 21, 1.6) + 0.5 * _noise(scene, 22, 3.5) - 0.15, 0, 1)[..., None] * (1 - 0.4 * t)
    sky = sky + 0.6 * cloud * (rgb("#eceae4") - sky)
    d = np.clip((scene.y - horizon) / (scene.height - horizon), 0, 1)
    wave = np.sin(26 * np.sqrt(d + 0.002) + 0.6 * np.sin(scene.x / (0.16 * s)))
    water = rgb("#3f7f92") * (1 + 0.14 * wave[..., None]) * (0.85 + 0.4 * (1 - d[..., None]))
    water = water.astype(np.float32)
    below = _soft(scene.y - horizon, 0.008 * s)[..., None]
    _fill(scene, sky + below * (water - sky), below[..., 0] * 0.004 * s * wave)


def garden(scene: Scene) -> None:
    s = scene.unit
    rng = np.random.default_rng(31)
    albedo = rgb("#40603c") * (1 + 0.3 * _noise(scene, 32, 2)[..., None])
    height = np.zeros((scene.height, scene.width), np.float32)
    leaves = ("#557a41", "#6f9450", "#3d6a47", "#86a25a", "#c9738a", "#e0b0a8")
    for k in range(70):
        x, y, r = rng.uniform(0, scene.width), rng.uniform(0, scene.height), rng.uniform(0.03, 0.075) * s
        disc = _soft(r - np.hypot(scene.x - x, scene.y - y), 0.012 * s)
        colour = rgb(leaves[k % 4 if k % 9 else 4 + (k // 9) % 2])
        albedo += 0.75 * disc[..., None] * (colour - albedo)
        height += 0.15 * disc * r
    _fill(scene, albedo, 0.4 * height)


def hills(scene: Scene) -> None:
    s = scene.unit
    t = np.clip(scene.y / (0.6 * scene.height), 0, 1)[..., None]
    albedo = rgb("#8fb0c6") + t * (rgb("#dfd6bf") - rgb("#8fb0c6"))
    height = np.zeros((scene.height, scene.width), np.float32)
    for base, swing, length, phase, colour in (
        (0.40, 0.05, 0.26, 0.4, "#8ea3a0"), (0.52, 0.06, 0.19, 2.0, "#7c9770"),
        (0.66, 0.07, 0.23, 3.9, "#8c9a52"), (0.84, 0.05, 0.20, 5.5, "#6f7f40"),
    ):  # fmt: skip
        line = base * scene.height + swing * s * np.sin(scene.x / (length * s) + phase)
        hill = _soft(scene.y - line, 0.008 * s)
        albedo += hill[..., None] * (rgb(colour) - albedo)
        depth = np.clip(scene.y - line, 0, None)
        height = height * (1 - hill) + hill * 0.25 * s * (1 - np.exp(-depth / (0.12 * s)))
    _fill(scene, albedo, 0.6 * height)


def winter_town(scene: Scene) -> None:
    s = scene.unit
    down = np.clip(scene.y / scene.height, 0, 1)[..., None]
    _fill(scene, rgb("#8598b0") + down * (rgb("#c6cacf") - rgb("#8598b0")))
    houses = ((0.02, 0.20, 0.30, "#92675d"), (0.27, 0.18, 0.40, "#ab8f6b"), (0.60, 0.17, 0.36, "#7a888e"),
              (0.80, 0.24, 0.27, "#9a7660"))  # fmt: skip
    for x, w, top, colour in houses:
        left, right, y = x * scene.width, (x + w) * scene.width, top * scene.height
        middle = (left + right) / 2
        gable = [(left, y), (middle, y - 0.12 * s), (right, y), (right, scene.height), (left, scene.height)]
        wall = scene.polygon(gable)
        scene.paint(wall, rgb(colour), 0.02 * s * blur(wall, 0.01 * s))
        snow = [(left - 0.02 * s, y), (middle, y - 0.135 * s), (right + 0.02 * s, y)]
        roof = scene.stroke(snow, [0.035 * s] * 3)
        scene.paint(roof, rgb("#d8dbe0"), 0.02 * s * blur(roof, 0.01 * s))
        for floor in range(3):
            for column in (0.3, 0.7):
                pane = _box(scene, left + column * (right - left), y + (0.08 + 0.14 * floor) * s, 0.02 * s, 0.03 * s)
                scene.paint(pane, rgb("#d8c08a"))


def draw_backdrop(scene: Scene, place: str) -> None:
    """Paints a place of `BACKDROPS` behind everything, a little out of focus as behind a portrait lens."""
    BACKDROPS[place](scene)
    scene.defocus(0.011 * scene.unit)


BACKDROPS = {
    "a brick wall": brick_wall,
    "a teal wall with pictures": plain_wall,
    "a window": window,
    "a bookshelf": bookshelf,
    "the sea": sea,
    "a garden": garden,
    "green hills": hills,
    "a town in winter": winter_town,
}
