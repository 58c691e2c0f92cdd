"""Draws the people of the demonstration set: body, head, face, hair and what they wear.

Positions are in head units: (0, 0) is the middle of the head, (±1, 0) its sides, (0, 1) the chin. A face is
drawn on a turned ellipsoid, so that eyes, nose and mouth move together and foreshorten when the head turns.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from preprocess.scene import Point, Scene, inflate, rgb, spline

TURN = {"left": -1.0, "right": 1.0, "front": 0.0}
_YAW = 0.62  # radians that a head turns
_HEAD_SHIFT = 0.10  # of the picture's width, to the side looked at
_BODY_SHIFT = 0.055


@dataclasses.dataclass(frozen=True)
class Person:
    """What one character looks like; colours as "#rrggbb".

    Attributes:
      kind: "woman", "man", "girl", "boy", "old man", "old woman": build and face.
      hair: "curls", "long", "bob", "bun", "short", "afro", "fringe" (bald on top), "braids".
      clothes: "coat", "turtleneck", "cardigan", "blouse", "shirt", "sweater", "dress", "scarf".
      beard, hat, glasses, earrings: extras; hat is "", "beanie" or "fedora".
    """

    kind: str
    skin: str
    hair: str
    hair_colour: str
    clothes: str
    cloth_colour: str
    second_colour: str
    eye_colour: str = "#5a4632"
    beard: bool = False
    hat: str = ""
    hat_colour: str = "#000000"
    glasses: bool = False
    earrings: bool = False


class _Head:
    """The frame of a turned head in a scene."""

    def __init__(self, scene: Scene, person: Person, looking: str) -> None:
        turn = TURN[looking]
        young = person.kind in ("girl", "boy")
        self.turn, self.yaw = turn, turn * _YAW
        self.rx = scene.unit * (0.172 if young else 0.178)
        self.ry = scene.unit * (0.205 if young else 0.228)
        self.cx = scene.width * (0.5 + _HEAD_SHIFT * turn)
        self.cy = scene.height * 0.5 - 0.075 * scene.unit + (0.02 * scene.unit if young else 0)
        self.roll = 0.05 * turn

    def at(self, u: float, v: float) -> Point:
        """Head units to pixels."""
        x, y = u * self.rx, v * self.ry
        c, s = np.cos(self.roll), np.sin(self.roll)
        return self.cx + c * x - s * y, self.cy + s * x + c * y

    def on(self, longitude: float, v: float, out: float = 1.0) -> Point:
        """A point of the face at `longitude` radians from its middle line, `out` radii from the axis."""
        radius = out * np.sqrt(max(1 - 0.5 * v * v, 0.2))
        return self.at(radius * np.sin(longitude + self.yaw), v)

    def narrow(self, longitude: float) -> float:
        """Foreshortening of widths there."""
        return max(float(np.cos(longitude + self.yaw)), 0.3)


def draw_person(scene: Scene, person: Person, looking: str) -> None:
    """Paints a person into the scene, head and shoulders, `looking` "left", "right" or "front" (viewer's)."""
    head = _Head(scene, person, looking)
    skin = rgb(person.skin)
    body = _body_mask(scene, head, person)
    outline = scene.polygon(_head_outline(head))
    back = _hair_back(scene, head, person)
    silhouette = np.maximum(np.maximum(body, outline), np.maximum(back, _cap(scene, head, 1.12)))
    scene.cast(silhouette, 0.085 * scene.unit)
    _paint_hair(scene, head, person, back, shade=0.72)
    _paint_body(scene, head, person, body, skin)
    scene.cast(np.maximum(outline, 0), 0.06 * scene.unit)
    if person.clothes == "scarf":
        _scarf(scene, head, person)
    _ears(scene, head, person, skin)
    _paint_face(scene, head, person, outline, skin)
    front = _hair_front(scene, head, person)
    scene.cast(front, 0.018 * scene.unit)
    _paint_hair(scene, head, person, front, shade=1.0)
    if person.glasses:
        _glasses(scene, head)
    if person.hat:
        _hat(scene, head, person)
    if person.earrings:
        for side in _visible_sides(head):
            x, y = head.at(side * 1.0 - 0.12 * head.turn, 0.52)
            dot = scene.ellipse(x, y, 0.055 * scene.unit * 0.5, 0.055 * scene.unit * 0.5)
            scene.paint(dot, rgb("#e8b84a"), inflate(dot, 0.01 * scene.unit), gloss=1.0)


def _visible_sides(head: _Head) -> tuple[int, ...]:
    """Sides of the head (-1 left, 1 right) whose ear is seen: not the one turned to the front."""
    return (-1, 1) if head.turn == 0 else (-int(head.turn),)


# ------------------------------------------------------------------------------------------------------ body


def _body_mask(scene: Scene, head: _Head, person: Person) -> np.ndarray:
    s = scene.unit
    cx = scene.width * (0.5 + _BODY_SHIFT * head.turn)
    top = head.cy + 1.12 * head.ry
    broad = {"man": 0.40, "old man": 0.38, "girl": 0.30, "boy": 0.31}.get(person.kind, 0.345) * s
    low = scene.height + 0.1 * s
    points = [
        (cx - 0.11 * s, top - 0.02 * s),
        (cx - 0.62 * broad, top + 0.055 * s),
        (cx - broad, top + 0.155 * s),
        (cx - 1.14 * broad, top + 0.34 * s),
        (cx - 1.2 * broad, low),
        (cx + 1.2 * broad, low),
        (cx + 1.14 * broad, top + 0.34 * s),
        (cx + broad, top + 0.155 * s),
        (cx + 0.62 * broad, top + 0.055 * s),
        (cx + 0.11 * s, top - 0.02 * s),
    ]
    return scene.polygon(spline(points))


def _paint_body(scene: Scene, head: _Head, person: Person, body: np.ndarray, skin: np.ndarray) -> None:
    s = scene.unit
    cx = scene.width * (0.5 + _BODY_SHIFT * head.turn)
    top = head.cy + 1.12 * head.ry
    cloth, second = rgb(person.cloth_colour), rgb(person.second_colour)
    height = inflate(body, 0.07 * s) + 0.5 * inflate(body, 0.02 * s)
    height += (
        0.012 * s * np.sin((scene.x - cx) / (0.05 * s) + 0.8 * np.sin(scene.y / (0.07 * s))) * body * 0.5
    )
    scene.paint(body, cloth, height, gloss=0.05)

    def neck(width: float, low: float) -> np.ndarray:
        lean = 0.35 * (head.cx - cx)
        return scene.polygon(
            spline(
                [
                    (head.cx - 0.9 * width * s - 0.02 * s * head.turn, head.cy + 0.55 * head.ry),
                    (cx + lean - width * s, top - 0.01 * s),
                    (cx - 1.25 * width * s, top + 0.03 * s),
                    (cx, top + low * s),
                    (cx + 1.25 * width * s, top + 0.03 * s),
                    (cx + lean + width * s, top - 0.01 * s),
                    (head.cx + 0.9 * width * s - 0.02 * s * head.turn, head.cy + 0.55 * head.ry),
                ]
            )
        )

    wide = 0.085 if person.kind in ("man", "old man") else 0.068
    clothes = person.clothes
    if clothes == "turtleneck":
        mask = neck(wide + 0.018, 0.03)
        scene.paint(mask, cloth * 1.08, inflate(mask, 0.03 * s), gloss=0.05)
        return
    low = {"blouse": 0.15, "dress": 0.12, "coat": 0.13, "shirt": 0.10}.get(clothes, 0.055)
    mask = neck(wide, low)
    if clothes in ("coat", "cardigan", "shirt"):  # an inner layer shows in the opening
        deep = 0.30 if clothes != "shirt" else 0.16
        opening = scene.polygon(
            [(cx - 0.115 * s, top - 0.01 * s), (cx, top + deep * s), (cx + 0.115 * s, top - 0.01 * s)]
        )
        scene.paint(opening, second, inflate(opening, 0.02 * s))
    scene.paint(mask, skin * 0.93, inflate(mask, 0.03 * s), gloss=0.08)
    if clothes in ("coat", "shirt", "cardigan"):
        for side in (-1, 1):
            reach = 0.17 if clothes == "coat" else 0.12
            lapel = scene.polygon(
                spline(
                    [
                        (cx + side * 0.075 * s, top - 0.035 * s),
                        (cx + side * 0.15 * s, top + 0.03 * s),
                        (cx + side * reach * s, top + 0.13 * s),
                        (cx + side * 0.012 * s, top + (0.27 if clothes == "coat" else 0.15) * s),
                        (cx + side * 0.06 * s, top + 0.08 * s),
                    ]
                )
            )
            scene.paint(lapel, cloth * 1.15, inflate(lapel, 0.018 * s), gloss=0.05)
        for k in range(3):
            if clothes == "cardigan":
                button = scene.ellipse(cx, top + (0.33 + 0.09 * k) * s, 0.013 * s, 0.013 * s)
                scene.paint(button, second, inflate(button, 0.006 * s), gloss=0.4)
    if clothes == "sweater":  # broad stripes
        wave = (scene.y - top - 0.10 * ((scene.x - cx) / (0.3 * s)) ** 2 * s) / (0.105 * s)
        stripes = np.clip(3.2 * np.sin(2 * np.pi * wave) + 0.5, 0, 1) * body * (1 - mask)
        scene.paint(stripes, second)
        collar = scene.stroke(
            [(cx - 0.095 * s, top - 0.005 * s), (cx, top + 0.062 * s), (cx + 0.095 * s, top - 0.005 * s)],
            [0.035 * s, 0.042 * s, 0.035 * s],
        )
        scene.paint(collar, cloth, inflate(collar, 0.014 * s))
    if clothes in ("dress", "blouse"):
        edge = scene.stroke(
            [(cx - 0.105 * s, top), (cx - 0.06 * s, top + 0.75 * low * s), (cx, top + low * s),
             (cx + 0.06 * s, top + 0.75 * low * s), (cx + 0.105 * s, top)],
            [0.02 * s, 0.022 * s, 0.024 * s, 0.022 * s, 0.02 * s],
        )  # fmt: skip
        scene.paint(edge, second, inflate(edge, 0.008 * s))


def _scarf(scene: Scene, head: _Head, person: Person) -> None:
    s, second = scene.unit, rgb(person.second_colour)
    cx = scene.width * (0.5 + _BODY_SHIFT * head.turn)
    top = head.cy + 1.12 * head.ry
    tail = scene.stroke(
        [(cx + 0.05 * s, top + 0.05 * s), (cx + 0.09 * s, top + 0.2 * s), (cx + 0.075 * s, top + 0.36 * s)],
        [0.09 * s, 0.095 * s, 0.1 * s],
    )
    scene.paint(tail, second * 0.85, inflate(tail, 0.025 * s))
    wrap = scene.stroke(
        [(cx - 0.15 * s, top - 0.02 * s), (cx, top + 0.052 * s), (cx + 0.15 * s, top - 0.02 * s)],
        [0.09 * s, 0.115 * s, 0.09 * s],
    )
    scene.paint(wrap, second, inflate(wrap, 0.03 * s))


# ------------------------------------------------------------------------------------------------------ face


def _head_outline(head: _Head) -> list[Point]:
    """Front view: an egg. Turned: the chin swings to the side looked at and the back of the head shows."""
    t = head.turn
    right = [(0.0, -1.0), (0.6, -0.84), (0.93, -0.4), (0.95, 0.1), (0.84, 0.52), (0.56, 0.85), (0.2, 1.0)]
    points = right + [(-u, v) for u, v in reversed(right[1:])]

    def swing(u: float, v: float) -> Point:
        forward = u * t > 0
        chin = 0.34 * t * max(v - 0.1, 0) ** 1.2
        if forward:
            u *= 0.93
        elif t:
            u *= 1.06 - 0.22 * max(v, 0)
        return head.at(u + chin, v)

    return spline([swing(u, v) for u, v in points])


def _ears(scene: Scene, head: _Head, person: Person, skin: np.ndarray) -> None:
    for side in _visible_sides(head):
        u = 0.97 * side if head.turn == 0 else side * 0.9
        x, y = head.at(u, 0.12)
        ear = scene.ellipse(x, y, 0.15 * head.rx, 0.2 * head.ry, 0.12 * side)
        scene.paint(
            ear, skin * np.array([0.98, 0.86, 0.82], np.float32), inflate(ear, 0.016 * scene.unit), 0.1
        )


def _paint_face(scene: Scene, head: _Head, person: Person, outline: np.ndarray, skin: np.ndarray) -> None:
    s, rx, ry = scene.unit, head.rx, head.ry
    height = inflate(outline, 0.10 * s, 2.6) + 0.45 * inflate(outline, 0.03 * s, 2.6)

    def bump(
        longitude: float, v: float, wide: float, tall: float, lift: float, out: float = 1.0
    ) -> np.ndarray:
        x, y = head.on(longitude, v, out)
        return lift * s * scene.spot(x, y, wide * rx * (0.5 + 0.5 * head.narrow(longitude)), tall * ry)

    height = height + bump(0, 0.18, 0.10, 0.20, 0.030, 1.02) + bump(0, 0.34, 0.13, 0.09, 0.034, 1.06)
    for side in (-1, 1):
        height = height + bump(side * 0.62, 0.34, 0.26, 0.20, 0.022)  # cheek
        height = height - bump(side * 0.42, 0.03, 0.22, 0.13, 0.020)  # socket
    height = height + bump(0, -0.22, 0.5, 0.1, 0.012) + bump(0, 0.88, 0.22, 0.12, 0.014)
    scene.paint(outline, skin, height, gloss=0.16)

    red = np.array([1.0, 0.62, 0.55], np.float32)
    for side in (-1, 1):
        x, y = head.on(side * 0.62, 0.36)
        scene.paint(scene.spot(x, y, 0.2 * rx, 0.14 * ry) * outline, skin * red, opacity=0.55)
        x, y = head.on(side * 0.42, 0.02)
        scene.paint(scene.spot(x, y, 0.24 * rx, 0.12 * ry) * outline, skin * 0.72, opacity=0.4)
    x, y = head.on(0, 0.34, 1.05)
    scene.paint(scene.spot(x, y, 0.12 * rx, 0.08 * ry) * outline, skin * red, opacity=0.45)
    x, y = head.on(0, 0.42, 1.02)
    scene.paint(scene.spot(x, y, 0.15 * rx, 0.032 * ry), skin * 0.4, opacity=0.6)

    if person.beard:
        _beard(scene, head, person, outline)
    _mouth(scene, head, person, skin)
    for side in (-1, 1):
        _eye(scene, head, person, side)


def _eye(scene: Scene, head: _Head, person: Person, side: int) -> None:
    longitude = 0.42 * side
    narrow = head.narrow(longitude)
    x, y = head.on(longitude, 0.06, 0.98)
    w, h = 0.205 * head.rx * (0.35 + 0.65 * narrow), 0.098 * head.ry
    young = person.kind in ("girl", "boy", "woman")
    h *= 1.15 if young else 0.95
    white = scene.polygon(
        spline([(x - w, y + 0.15 * h), (x, y - h), (x + w, y + 0.1 * h), (x, y + 0.78 * h)])
    )
    scene.paint(white, rgb("#efe9e2"), inflate(white, 0.012 * scene.unit), gloss=0.5)
    gaze = 0.30 * head.turn * w
    iris = scene.ellipse(x + gaze, y - 0.05 * h, 0.105 * head.rx, 0.09 * head.ry) * white
    scene.paint(iris, rgb(person.eye_colour), gloss=0.9)
    pupil = scene.ellipse(x + gaze, y - 0.05 * h, 0.055 * head.rx, 0.046 * head.ry) * white
    scene.paint(pupil, rgb("#0c0908"), gloss=0.9)
    light = scene.ellipse(x + gaze + 0.035 * head.rx, y - 0.35 * h, 0.03 * head.rx, 0.026 * head.ry)
    scene.paint(light, np.array([2.2, 2.2, 2.2], np.float32))
    lid = scene.stroke(
        [(x - 1.08 * w, y + 0.1 * h), (x, y - 1.05 * h), (x + 1.08 * w, y + 0.05 * h)],
        [0.018 * head.rx, 0.075 * head.rx, 0.022 * head.rx],
    )
    scene.paint(lid, rgb("#2a1a14"), opacity=0.85)

    bx, by = head.on(longitude, -0.17, 1.0)
    bw = 0.27 * head.rx * (0.4 + 0.6 * narrow)
    thick = (0.085 if "man" in person.kind and "wo" not in person.kind else 0.06) * head.rx
    inner = -side
    brow = scene.stroke(
        [
            (bx + inner * bw, by + 0.035 * head.ry),
            (bx, by - 0.03 * head.ry),
            (bx - inner * bw, by + 0.03 * head.ry),
        ],
        [1.15 * thick, thick, 0.45 * thick],
    )
    scene.paint(brow, rgb(person.hair_colour) * 0.7, opacity=0.9)


def _mouth(scene: Scene, head: _Head, person: Person, skin: np.ndarray) -> None:
    female = person.kind in ("woman", "girl", "old woman")
    tint = np.array([0.80, 0.36, 0.34] if female else [0.78, 0.50, 0.46], np.float32)
    v = 0.63
    left, right = head.on(-0.30, v - 0.012, 0.97), head.on(0.30, v - 0.012, 0.97)
    middle = head.on(0, v, 1.0)
    full = (0.052 if female else 0.04) * head.ry
    upper = [left, (middle[0] - 0.05 * head.rx, middle[1] - full), (middle[0], middle[1] - 0.7 * full),
             (middle[0] + 0.05 * head.rx, middle[1] - full), right, (middle[0], middle[1] + 0.35 * full)]  # fmt: skip
    lower = [left, (middle[0], middle[1] + 0.3 * full), right, (middle[0], middle[1] + 1.75 * full)]
    mask = scene.polygon(spline(lower))
    scene.paint(mask, skin * tint, gloss=0.35)
    mask = scene.polygon(spline(upper))
    scene.paint(mask, skin * tint * 0.8, gloss=0.15)
    line = scene.stroke(
        [left, (middle[0], middle[1] + 0.28 * full), right],
        [0.012 * head.rx, 0.035 * head.rx, 0.012 * head.rx],
    )
    scene.paint(line, skin * 0.22, opacity=0.8)


def _beard(scene: Scene, head: _Head, person: Person, outline: np.ndarray) -> None:
    lons = [-1.1, -0.95, -0.62, -0.3, 0.0, 0.3, 0.62, 0.95, 1.1]
    tops = [0.0, 0.35, 0.50, 0.475, 0.485, 0.475, 0.50, 0.35, 0.0]
    upper = [head.on(lon, v, 1.0) for lon, v in zip(lons, tops)]
    shift = 0.34 * head.turn
    lower = [head.at(u + shift * max(v - 0.1, 0), v) for u, v in
             ((1.05, 0.2), (0.93, 0.62), (0.62, 0.98), (0.2, 1.16), (-0.2, 1.16), (-0.62, 0.98), (-0.93, 0.62), (-1.05, 0.2))]  # fmt: skip
    mask = scene.polygon(upper + lower)
    lip = head.on(0, 0.66, 1.0)
    mask = blur(mask, 0.008 * scene.unit) if False else mask
    mask = mask * (1 - scene.ellipse(*lip, 0.27 * head.rx, 0.075 * head.ry))
    scene.paint(
        mask,
        rgb(person.hair_colour),
        inflate(mask, 0.028 * scene.unit) + inflate(outline, 0.08 * scene.unit),
        0.05,
    )


# ------------------------------------------------------------------------------------------------------ hair


def _cap(scene: Scene, head: _Head, grow: float) -> np.ndarray:
    """The skull with hair on it: wider towards the back of a turned head."""
    x, y = head.at(-0.10 * head.turn, -0.12)
    return scene.ellipse(x, y, grow * head.rx, grow * 0.96 * head.ry)


def _face_opening(scene: Scene, head: _Head, top: float, side: float, part: float = 0.0) -> np.ndarray:
    """Where hair leaves the face free: hairline at v = `top`, sides at longitude ±`side`."""
    lons = [-side, -side, -0.8 * side, -0.45, 0.0, 0.45, 0.8 * side, side, side]
    vs = [1.5, 0.2, -0.3, top + 0.06, top - 0.03, top + 0.05, -0.3, 0.2, 1.5]
    points = []
    for lon, v in zip(lons, vs):
        over = max(abs(lon + head.yaw) - 1.35, 0) * np.sign(lon)
        u = np.sqrt(max(1 - 0.3 * min(v, 1) ** 2, 0.3)) * np.sin(np.clip(lon + head.yaw, -1.5, 1.5))
        points.append(head.at(u + 1.6 * over + part * (v < -0.35), v))
    return scene.polygon(spline(points))


def _hair_back(scene: Scene, head: _Head, person: Person) -> np.ndarray:
    s = person.hair
    if s == "long":
        points = [
            (-1.15, -0.4),
            (-1.28, 0.5),
            (-1.35, 1.3),
            (-1.0, 1.75),
            (0, 1.6),
            (1.0, 1.75),
            (1.35, 1.3),
            (1.28, 0.5),
            (1.15, -0.4),
            (0, -1.1),
        ]
    elif s == "bob":
        points = [
            (-1.12, -0.4),
            (-1.3, 0.35),
            (-1.22, 0.95),
            (-0.6, 1.02),
            (0.6, 1.02),
            (1.22, 0.95),
            (1.3, 0.35),
            (1.12, -0.4),
            (0, -1.1),
        ]
    elif s == "curls":
        return _curls(
            scene,
            head,
            [(a, 1.02 + 0.16 * np.cos(a - np.pi / 2)) for a in np.linspace(-0.35, np.pi + 0.35, 15)]
            + [(0.75, 1.25), (-0.75 + np.pi * 2 - np.pi, 1.25)],
            0.3,
        )
    elif s == "afro":
        x, y = head.at(-0.12 * head.turn, -0.32)
        return scene.ellipse(x, y, 1.42 * head.rx, 1.12 * head.ry)
    elif s == "bun":
        x, y = head.at(-0.35 * head.turn, -1.12)
        return scene.ellipse(x, y, 0.46 * head.rx, 0.36 * head.ry)
    else:
        return np.zeros((scene.height, scene.width), np.float32)
    return scene.polygon(spline([head.at(u - 0.14 * head.turn, v) for u, v in points]))


def _curls(scene: Scene, head: _Head, places: list[tuple[float, float]], radius: float) -> np.ndarray:
    """A union of discs at (angle, distance) around the head; angle 0 right, pi/2 up."""
    mask = np.zeros((scene.height, scene.width), np.float32)
    for k, (angle, distance) in enumerate(places):
        x, y = head.at(-0.1 * head.turn + distance * np.cos(angle), -distance * np.sin(angle) * 0.95)
        r = radius * (1 + 0.18 * np.sin(2.4 * k))
        mask = np.maximum(mask, scene.ellipse(x, y, r * head.rx, r * head.rx))
    return mask


def _hair_front(scene: Scene, head: _Head, person: Person) -> np.ndarray:
    s = person.hair
    top, side, grow = {
        "long": (-0.55, 0.95, 1.14),
        "bob": (-0.32, 0.95, 1.14),
        "curls": (-0.50, 1.05, 1.12),
        "bun": (-0.55, 1.12, 1.06),
        "short": (-0.58, 1.18, 1.07),
        "afro": (-0.52, 1.15, 1.10),
        "fringe": (-1.3, 1.2, 1.05),
        "braids": (-0.45, 1.0, 1.10),
    }[s]
    cap = _cap(scene, head, grow)
    if s in ("long", "bob"):
        back = _hair_back(scene, head, person)
        sides = scene.polygon(
            spline(
                [
                    head.at(u - 0.14 * head.turn, v)
                    for u, v in [
                        (-1.15, -0.4),
                        (-1.22, 0.5),
                        (-1.0, 0.95),
                        (0, 1.4),
                        (1.0, 0.95),
                        (1.22, 0.5),
                        (1.15, -0.4),
                        (0, -1.1),
                    ]
                ]
            )
        )
        cap = np.maximum(cap, np.minimum(back, sides))
    if s == "curls":
        cap = np.maximum(
            cap, _curls(scene, head, [(a, 0.98) for a in np.linspace(0.1, np.pi - 0.1, 9)], 0.27)
        )
    mask = cap * (1 - _face_opening(scene, head, top, side))
    if s == "short":
        below = np.clip((head.cy + 0.12 * head.ry - scene.y) / (0.05 * head.ry), 0, 1)
        mask = mask * below
    if s in ("bun", "afro", "fringe"):
        below = np.clip((head.cy + 0.25 * head.ry - scene.y) / (0.06 * head.ry), 0, 1)
        mask = mask * below
    if s == "fringe":
        above = np.clip((scene.y - head.cy + 0.38 * head.ry) / (0.25 * head.ry), 0, 1)
        mask = mask * above
    if s == "braids":
        mask = mask * np.clip((head.cy + 0.6 * head.ry - scene.y) / (0.06 * head.ry), 0, 1)
        for side_ in (-1, 1):
            for k in range(6):
                x, y = head.at(side_ * (1.02 + 0.03 * k) - 0.12 * head.turn, 0.5 + 0.24 * k)
                mask = np.maximum(mask, scene.ellipse(x, y, 0.19 * head.rx, 0.17 * head.ry))
    return mask


def _paint_hair(scene: Scene, head: _Head, person: Person, mask: np.ndarray, shade: float) -> None:
    if not mask.any():
        return
    s = scene.unit
    colour = rgb(person.hair_colour) * shade
    height = inflate(mask, 0.045 * s, 2.2) + 0.6 * inflate(mask, 0.014 * s, 2.2)
    x, y = head.at(-0.15 * head.turn, -1.0)
    dx, dy = scene.x - x, scene.y - y
    angle, far = np.arctan2(dy, dx), np.hypot(dx, dy) / s
    if person.hair in ("curls", "afro"):
        strands = np.sin(dx / (0.016 * s) + 2 * np.sin(dy / (0.021 * s))) * np.sin(dy / (0.017 * s))
        height = height + 0.004 * s * strands
    else:
        strands = np.sin(31 * angle + 3 * np.sin(9 * far)) * 0.6 + 0.4 * np.sin(67 * angle + 5 * far)
        height = height + 0.0022 * s * strands
    texture = 1 + 0.16 * strands[..., None]
    scene.paint(mask, colour * texture, height, gloss=0.22 if person.hair not in ("curls", "afro") else 0.08)


# ---------------------------------------------------------------------------------------------------- extras


def _glasses(scene: Scene, head: _Head) -> None:
    dark = rgb("#2b2220")
    for side in (-1, 1):
        x, y = head.on(0.42 * side, 0.07, 1.0)
        w = 0.34 * head.rx * (0.3 + 0.7 * head.narrow(0.42 * side))
        h = 0.215 * head.ry
        rim = scene.ellipse(x, y, w, h) * (1 - scene.ellipse(x, y, w - 0.05 * head.rx, h - 0.05 * head.rx))
        scene.paint(rim, dark, gloss=0.6)
    bridge = scene.stroke(
        [head.on(-0.12, 0.03, 1.05), head.on(0, 0.0, 1.08), head.on(0.12, 0.03, 1.05)], [0.05 * head.rx] * 3
    )
    scene.paint(bridge, dark, gloss=0.6)
    for side in _visible_sides(head):
        arm = scene.stroke([head.on(0.80 * side, 0.03), head.on(1.15 * side, 0.03)], [0.045 * head.rx] * 2)
        scene.paint(arm, dark)


def _hat(scene: Scene, head: _Head, person: Person) -> None:
    s, colour = scene.unit, rgb(person.hat_colour)
    t = head.turn
    if person.hat == "beanie":
        dome = scene.polygon(
            spline(
                [
                    head.at(u - 0.08 * t, v)
                    for u, v in [
                        (-1.12, -0.42),
                        (-1.12, -0.85),
                        (-0.7, -1.28),
                        (0, -1.42),
                        (0.7, -1.28),
                        (1.12, -0.85),
                        (1.12, -0.42),
                        (0, -0.5),
                    ]
                ]
            )
        )
        scene.cast(dome, 0.015 * s)
        ribs = 1 + 0.12 * np.sin((scene.x - head.cx) / (0.012 * s))[..., None]
        scene.paint(dome, colour * ribs, inflate(dome, 0.04 * s))
        band = scene.stroke(
            [head.at(-1.16 - 0.08 * t, -0.38), head.at(-0.08 * t, -0.55), head.at(1.16 - 0.08 * t, -0.38)],
            [0.3 * head.ry] * 3,
        )
        scene.paint(band, colour * 1.25 * ribs, inflate(band, 0.022 * s))
        x, y = head.at(-0.1 * t, -1.5)
        ball = scene.ellipse(x, y, 0.24 * head.rx, 0.24 * head.rx)
        scene.paint(ball, rgb("#f0e6da"), inflate(ball, 0.025 * s))
        return
    crown = scene.polygon(
        spline(
            [
                head.at(u - 0.06 * t, v)
                for u, v in [
                    (-0.98, -0.55),
                    (-0.92, -1.1),
                    (-0.6, -1.42),
                    (-0.15, -1.36),
                    (0.15, -1.36),
                    (0.6, -1.42),
                    (0.92, -1.1),
                    (0.98, -0.55),
                    (0, -0.45),
                ]
            ]
        )
    )
    brim = scene.polygon(
        spline(
            [
                head.at(u + 0.12 * t, v)
                for u, v in [
                    (-1.6, -0.52),
                    (-0.9, -0.72),
                    (0, -0.76),
                    (0.9, -0.72),
                    (1.6, -0.52),
                    (0.9, -0.42),
                    (0, -0.36),
                    (-0.9, -0.42),
                ]
            ]
        )
    )
    scene.cast(np.maximum(brim, crown), 0.03 * s)
    scene.paint(crown, colour, inflate(crown, 0.045 * s), 0.05)
    band = (
        scene.stroke(
            [head.at(-0.98 - 0.06 * t, -0.68), head.at(-0.06 * t, -0.66), head.at(0.98 - 0.06 * t, -0.68)],
            [0.2 * head.ry] * 3,
        )
        * crown
    )
    scene.paint(band, colour * 0.35)
    scene.paint(brim, colour * 1.05, inflate(brim, 0.02 * s), 0.05)
