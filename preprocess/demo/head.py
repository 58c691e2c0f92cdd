"""The frame of a turned head, and the face on it.

Positions are in head units: (0, 0) is the middle of the head, (±1, 0) its sides, (0, 1) the chin. A face is
drawn on a turned ellipsoid, so that eyes, nose and mouth move together and foreshorten when the head turns.
"""

from __future__ import annotations

import numpy as np

from preprocess.demo.cast import Person
from preprocess.demo.scene import Point, Scene, blur, inflate, rgb, spline

_TURN = {"left": -1, "front": 0, "right": 1}
_YAW = 0.54  # radians that a head turns
_HEAD_SHIFT = 0.10  # of the picture's width, towards the side looked at
_BODY_SHIFT = 0.055  # the shoulders follow half-way
_CLOSE_UP = 1.13  # size of people: larger faces keep more of themselves at 128 pixels
_FLUSHED = np.array([1.0, 0.62, 0.55], np.float32)  # skin where blood shows: cheeks, nose, ears
_INK = rgb("#2a1c18")


class Head:
    """Where a head is in a scene, and how far it is turned (`turn` -1 left, 0, 1 right of the picture)."""

    def __init__(self, scene: Scene, person: Person, looking: str) -> None:
        s = self.unit = _CLOSE_UP * scene.unit
        self.turn = _TURN[looking]
        self.yaw = self.turn * _YAW
        self.rx, self.ry = (0.176 * s, 0.205 * s) if person.young else (0.178 * s, 0.226 * s)
        self.cx = scene.width * (0.5 + _HEAD_SHIFT * self.turn)
        self.cy = 0.5 * scene.height - (0.050 if person.young else 0.070) * s
        self.body_x = scene.width * (0.5 + _BODY_SHIFT * self.turn)
        self.body_y = self.cy + 1.12 * self.ry  # the pit of the neck
        self.roll = 0.05 * self.turn

    def at(self, u: float, v: float) -> Point:
        """Head units to pixels."""
        x, y = u * self.rx, v * self.ry
        c, s = np.cos(self.roll), np.sin(self.roll)
        return self.cx + c * x - s * y, self.cy + s * x + c * y

    def points(self, places: list[Point], back: float = 0.0) -> list[Point]:
        """Many head units to pixels, moved by `back` units away from where the face looks."""
        return [self.at(u - back * self.turn, v) for u, v in places]

    def on(self, longitude: float, v: float, out: float = 1.0) -> Point:
        """A point of the face at `longitude` radians from its middle line, `out` radii from the axis."""
        radius = out * np.sqrt(max(1 - 0.5 * v * v, 0.2))
        return self.at(radius * np.sin(longitude + self.yaw), v)

    def narrow(self, longitude: float) -> float:
        """Foreshortening of widths there."""
        return max(float(np.cos(longitude + self.yaw)), 0.3)

    def ear(self, side: int) -> Point:
        """The middle of the ear on `side` (-1 left, 1 right of the picture), pixels."""
        return self.at(0.97 * side if self.turn == 0 else 0.74 * side, 0.13)

    def ear_sides(self) -> tuple[int, ...]:
        """Sides whose ear is seen: of a turned head only the one away from where it looks."""
        return (-1, 1) if self.turn == 0 else (-self.turn,)


def head_outline(head: Head) -> list[Point]:
    """Front view: an egg. Turned: the chin swings to the side looked at and the back of the head shows."""
    half = [(0.0, -1.0), (0.6, -0.84), (0.93, -0.4), (0.95, 0.1), (0.84, 0.52), (0.54, 0.85), (0.19, 0.99)]
    egg = half + [(-u, v) for u, v in reversed(half[1:])]
    turned = []
    for u, v in egg:
        chin = 0.30 * head.turn * max(v - 0.1, 0) ** 1.2
        if u * head.turn > 0:
            u *= 0.94
        elif head.turn:
            u *= 1.06 - 0.24 * max(v, 0)
        turned.append(head.at(u + chin, v))
    return spline(turned)


def paint_face(scene: Scene, head: Head, person: Person, outline: np.ndarray) -> None:
    """Skull, nose, cheeks, beard, mouth and eyes, within the mask `outline`."""
    s, rx, ry, skin = head.unit, head.rx, head.ry, rgb(person.skin)
    height = inflate(outline, 0.10 * s, 2.4) + 0.4 * inflate(outline, 0.03 * s, 2.4)

    def spot(longitude: float, v: float, wide: float, tall: float, out: float = 1.0) -> np.ndarray:
        x, y = head.on(longitude, v, out)
        return scene.spot(x, y, wide * rx * (0.5 + 0.5 * head.narrow(longitude)), tall * ry)

    # Relief, in parts of the unit: brow, bridge and tip of the nose, cheeks, eye sockets, chin.
    height = height + s * (
        0.010 * spot(0, -0.22, 0.5, 0.1)
        + 0.028 * spot(0, 0.16, 0.10, 0.20, 1.02)
        + 0.034 * spot(0, 0.34, 0.13, 0.09, 1.06)
        + 0.014 * spot(0, 0.88, 0.22, 0.12)
    )
    for side in (-1, 1):
        height = height + s * (
            0.020 * spot(0.62 * side, 0.34, 0.26, 0.20) - 0.018 * spot(0.40 * side, 0.03, 0.22, 0.13)
        )
    scene.paint(outline, skin, height, gloss=0.14)

    for side in (-1, 1):
        scene.paint(spot(0.62 * side, 0.37, 0.20, 0.13) * outline, skin * _FLUSHED, opacity=0.6)
        scene.paint(spot(0.40 * side, 0.01, 0.24, 0.11) * outline, skin * 0.70, opacity=0.45)
    _nose(scene, head, skin, outline)
    if person.beard:
        _beard(scene, head, person, outline)
    _mouth(scene, head, person, skin)
    for side in (-1, 1):
        _eye(scene, head, person, side, outline)


def paint_ears(scene: Scene, head: Head, person: Person) -> None:
    s, skin = head.unit, rgb(person.skin) * np.array([0.98, 0.86, 0.82], np.float32)
    for side in head.ear_sides():
        x, y = head.ear(side)
        ear = scene.ellipse(x, y, 0.135 * head.rx, 0.185 * head.ry, 0.15 * side)
        scene.paint(ear, skin, inflate(ear, 0.014 * s), gloss=0.1)
        inner = blur(scene.ellipse(x, y - 0.01 * head.ry, 0.07 * head.rx, 0.11 * head.ry, 0.15 * side), 0.004 * s)
        scene.paint(inner, skin * 0.62, opacity=0.6)


def _nose(scene: Scene, head: Head, skin: np.ndarray, outline: np.ndarray) -> None:
    s, rx, ry = head.unit, head.rx, head.ry
    x, y = head.on(0, 0.33, 1.06)
    scene.paint(scene.spot(x, y, 0.13 * rx, 0.09 * ry) * outline, skin * _FLUSHED, opacity=0.5)
    # A soft edge along the bridge on the far side of a turned nose, and the shade under the tip.
    if head.turn:
        edge = [
            head.on(0.30 * head.turn, -0.08, 0.98),
            head.on(0.16 * head.turn, 0.12, 1.03),
            head.on(0.10 * head.turn, 0.36, 1.15),
        ]
        scene.paint(
            blur(scene.stroke(edge, [0.02 * rx, 0.05 * rx, 0.08 * rx]), 0.006 * s) * outline,
            skin * 0.45,
            opacity=0.55,
        )
    base = [head.on(-0.19, 0.385, 1.02), head.on(0, 0.43, 1.08), head.on(0.19, 0.385, 1.02)]
    scene.paint(blur(scene.stroke(base, [0.03 * rx, 0.07 * rx, 0.03 * rx]), 0.004 * s), skin * 0.38, opacity=0.7)


def _eye(scene: Scene, head: Head, person: Person, side: int, outline: np.ndarray) -> None:
    rx, ry = head.rx, head.ry
    longitude = 0.40 * side
    narrow = head.narrow(longitude)
    x, y = head.on(longitude, 0.06, 0.98)
    w, h = 0.215 * rx * (0.25 + 0.75 * narrow), (0.100 if person.female or person.young else 0.085) * ry
    almond = spline([(x - w, y + 0.12 * h), (x - 0.1 * w, y - h), (x + w, y + 0.10 * h), (x, y + 0.8 * h)])
    white = scene.polygon(almond) * outline
    scene.paint(white, rgb("#e6dfd8"), inflate(white, 0.012 * head.unit), gloss=0.5)
    ix, iy = x + 0.28 * head.turn * w, y - 0.06 * h
    size = 0.118 * rx
    scene.paint(scene.ellipse(ix, iy, size * (0.5 + 0.5 * narrow), size) * white, rgb(person.eyes), gloss=0.9)
    scene.paint(
        scene.ellipse(ix, iy, 0.52 * size * (0.5 + 0.5 * narrow), 0.52 * size) * white,
        rgb("#0c0908"),
        gloss=0.9,
    )
    # Catch light: brighter than white paint, so that eyes live under every light.
    scene.paint(
        scene.ellipse(ix + 0.33 * size, iy - 0.36 * size, 0.28 * size, 0.28 * size) * outline,
        np.full(3, 2.0, np.float32),
    )
    lid = scene.stroke([(x - 1.08 * w, y + 0.12 * h), (x - 0.1 * w, y - 1.02 * h), (x + 1.1 * w, y + 0.06 * h)],
                       [0.02 * rx, (0.085 if person.female else 0.065) * rx, 0.025 * rx])  # fmt: skip
    scene.paint(lid * outline, _INK, opacity=0.85)

    bx, by = head.on(longitude, -0.18, 1.0)
    bw = 0.27 * rx * (0.3 + 0.7 * narrow)
    thick = (0.062 if person.female or person.young else 0.095) * rx
    arch = [(bx - side * bw, by), (bx + 0.1 * side * bw, by - 0.045 * ry), (bx + side * bw, by + 0.025 * ry)]
    brow = scene.stroke(arch, [1.1 * thick, thick, 0.45 * thick])
    scene.paint(brow * outline, rgb(person.hair_colour) * 0.65, opacity=0.9)


def _mouth(scene: Scene, head: Head, person: Person, skin: np.ndarray) -> None:
    rx, ry = head.rx, head.ry
    tint = np.array([0.78, 0.36, 0.34] if person.female else [0.76, 0.50, 0.46], np.float32)
    full = (0.056 if person.female else 0.045) * ry
    (lx, ly), (mx, my), (hx, hy) = (
        head.on(-0.33, 0.61, 0.97),
        head.on(0, 0.645, 1.0),
        head.on(0.33, 0.61, 0.97),
    )
    lower = scene.polygon(spline([(lx, ly), (mx, my + 0.3 * full), (hx, hy), (mx, my + 1.75 * full)]))
    scene.paint(lower, skin * tint, gloss=0.3)
    bow = 0.06 * rx
    upper = [
        (lx, ly),
        (mx - bow, my - full),
        (mx, my - 0.7 * full),
        (mx + bow, my - full),
        (hx, hy),
        (mx, my + 0.4 * full),
    ]
    scene.paint(scene.polygon(spline(upper)), skin * tint * 0.8, gloss=0.12)
    line = scene.stroke(
        [(lx, ly - 0.01 * ry), (mx, my + 0.3 * full), (hx, hy - 0.01 * ry)],
        [0.02 * rx, 0.035 * rx, 0.02 * rx],
    )
    scene.paint(line, skin * 0.22, opacity=0.8)


def _beard(scene: Scene, head: Head, person: Person, outline: np.ndarray) -> None:
    s, colour = head.unit, rgb(person.hair_colour)
    moustache = [
        (-0.36, 0.60),
        (-0.2, 0.49),
        (0.0, 0.475),
        (0.2, 0.49),
        (0.36, 0.60),
        (0.18, 0.60),
        (0.0, 0.575),
        (-0.18, 0.60),
    ]
    if person.beard == "moustache":
        mask = scene.polygon(spline([head.on(lon, v, 1.02) for lon, v in moustache]))
    else:
        # On the far side of a turned head the cheek hides the sideburn.
        upper = []
        for lon, v in (
            (-1.12, 0.02),
            (-0.92, 0.36),
            (-0.62, 0.51),
            (-0.3, 0.48),
            (0.0, 0.485),
            (0.3, 0.48),
            (0.62, 0.51),
            (0.92, 0.36),
            (1.12, 0.02),
        ):
            if lon * head.turn > 0:
                v = max(v, 0.42)
            upper.append(head.on(lon, v))
        lower = []
        for u, v in (
            (1.0, 0.25),
            (0.92, 0.62),
            (0.62, 0.98),
            (0.2, 1.15),
            (-0.2, 1.15),
            (-0.62, 0.98),
            (-0.92, 0.62),
            (-1.0, 0.25),
        ):
            if u * head.turn > 0:
                u, v = 0.95 * u, max(v, 0.5)
            elif head.turn:
                u *= 0.86
            lower.append(head.at(u + 0.30 * head.turn * max(v - 0.1, 0), v))
        mask = scene.polygon(upper + lower)
    mask = blur(mask, 0.004 * s) * np.clip(4 * blur(outline, 0.022 * s), 0, 1)  # no further than the jaw
    lip = head.on(0, 0.665, 1.0)
    mask = mask * (1 - blur(scene.ellipse(*lip, 0.26 * head.rx, 0.07 * head.ry), 0.003 * s))
    scene.paint(mask, colour, inflate(mask, 0.022 * s) + inflate(outline, 0.08 * s), gloss=0.05)
