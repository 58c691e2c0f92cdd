"""What the cast wears: body and neck, garments, scarf, hats, glasses, earrings."""

from __future__ import annotations

import numpy as np

from preprocess.demo.cast import Person
from preprocess.demo.head import Head
from preprocess.demo.scene import Point, Scene, blur, inflate, rgb, spline

_SHOULDER = {"man": 0.375, "old man": 0.36, "woman": 0.325, "girl": 0.29, "boy": 0.30}  # half width, units
_NECK = {"man": 0.084, "old man": 0.080, "woman": 0.064, "girl": 0.058, "boy": 0.060}
_NECKLINE = {"coat": 0.13, "cardigan": 0.07, "blouse": 0.14, "dress": 0.12}  # depth below the pit of the neck


def body_mask(scene: Scene, head: Head, person: Person) -> np.ndarray:
    s, x, y = head.unit, head.body_x, head.body_y
    broad = _SHOULDER[person.kind] * s
    left = [(-0.105 * s, -0.02 * s), (-0.55 * broad, 0.060 * s), (-0.93 * broad, 0.135 * s),
            (-1.08 * broad, 0.26 * s), (-1.13 * broad, 0.40 * s)]  # fmt: skip
    low = scene.height + 0.1 * s - y
    outline = left + [(-1.12 * broad, low), (1.12 * broad, low)] + [(-u, v) for u, v in reversed(left)]
    return scene.polygon(spline([(x + u, y + v) for u, v in outline]))


def paint_body(scene: Scene, head: Head, person: Person, body: np.ndarray) -> None:
    """The garment over the mask `body`, the neck, and what lies around it."""
    s, x, y = head.unit, head.body_x, head.body_y
    cloth, second, skin = rgb(person.cloth), rgb(person.second), rgb(person.skin)
    broad = _SHOULDER[person.kind] * s
    folds = np.sin((scene.x - x) / (0.05 * s) + 0.8 * np.sin(scene.y / (0.07 * s)))
    height = inflate(body, 0.07 * s, 2.2) + 0.5 * inflate(body, 0.02 * s) + 0.005 * s * folds * body
    scene.paint(body, cloth, height, gloss=0.04)
    if person.clothes == "sweater":
        wave = (scene.y - y - 0.10 * s * ((scene.x - x) / (0.3 * s)) ** 2) / (0.115 * s)
        scene.paint(np.clip(2.2 * np.sin(2 * np.pi * wave) + 0.5, 0, 1) * body, second)
    for side in (-1, 1):  # where the arm meets the side
        crease = [
            (x + 0.80 * side * broad, y + 0.30 * s),
            (x + 0.74 * side * broad, y + 0.42 * s),
            (x + 0.76 * side * broad, y + 0.60 * s),
        ]
        scene.paint(
            blur(scene.stroke(crease, [0.004 * s, 0.014 * s, 0.02 * s]), 0.006 * s) * body,
            cloth * 0.45,
            opacity=0.55,
        )

    wide = _NECK[person.kind]
    if person.clothes in ("turtleneck", "scarf"):
        collar = _neck(scene, head, wide + 0.016, 0.03)
        scene.paint(collar, cloth * 1.1, inflate(collar, 0.03 * s), gloss=0.04)
    else:
        if person.clothes in ("coat", "cardigan"):  # the shirt shows in the opening
            depth = 0.25 if person.clothes == "coat" else 0.30
            opening = scene.polygon([(x - 0.115 * s, y - 0.01 * s), (x, y + depth * s), (x + 0.115 * s, y - 0.01 * s)])
            scene.paint(opening, second, inflate(opening, 0.02 * s))
        neck = _neck(scene, head, wide, _NECKLINE.get(person.clothes, 0.055))
        scene.paint(neck, skin * 0.94, inflate(neck, 0.03 * s), gloss=0.08)
    _trimming(scene, head, person)


def _neck(scene: Scene, head: Head, wide: float, depth: float) -> np.ndarray:
    """A neck of half width `wide` units from the head to `depth` units below its pit."""
    s, x, y = head.unit, head.body_x, head.body_y
    top = head.cx - 0.025 * s * head.turn
    lean = x + 0.35 * (head.cx - x)
    half = [(top, 0.9, head.cy + 0.55 * head.ry), (lean, 1.0, y - 0.01 * s), (x, 1.25, y + 0.03 * s)]
    points = [(c - w * wide * s, v) for c, w, v in half] + [(x, y + depth * s)]
    return scene.polygon(spline(points + [(c + w * wide * s, v) for c, w, v in reversed(half)]))


def _trimming(scene: Scene, head: Head, person: Person) -> None:
    s, x, y = head.unit, head.body_x, head.body_y
    cloth, second = rgb(person.cloth), rgb(person.second)

    def place(points: list[Point], flip: int = 1) -> list[Point]:
        return [(x + flip * u * s, y + v * s) for u, v in points]

    if person.clothes in ("coat", "cardigan"):
        coat = person.clothes == "coat"
        reach, low = (0.17, 0.27) if coat else (0.11, 0.30)
        for side in (-1, 1):
            lapel = [(0.075, -0.035), (0.145, 0.03), (reach, 0.13), (0.012, low), (0.06, 0.08)]
            mask = scene.polygon(spline(place(lapel, side)))
            scene.paint(mask, cloth * 1.18, inflate(mask, 0.018 * s), gloss=0.04)
        for k in range(2):
            u, v = place([(0.0, low + 0.055 + 0.1 * k)])[0]
            button = scene.ellipse(u, v, 0.014 * s, 0.014 * s)
            scene.paint(button, second * 0.8, inflate(button, 0.006 * s), gloss=0.4)
    if person.clothes == "sweater":
        collar = scene.stroke(place([(-0.095, -0.005), (0, 0.062), (0.095, -0.005)]), [0.035 * s, 0.042 * s, 0.035 * s])
        scene.paint(collar, cloth, inflate(collar, 0.014 * s))
    if person.clothes in ("dress", "blouse"):
        low = _NECKLINE[person.clothes]
        edge = place([(-0.105, 0), (-0.06, 0.75 * low), (0, low), (0.06, 0.75 * low), (0.105, 0)])
        mask = scene.stroke(edge, [0.022 * s] * 5)
        scene.paint(mask, second, inflate(mask, 0.008 * s))
    if person.clothes == "scarf":
        tail = scene.stroke(place([(0.05, 0.05), (0.09, 0.2), (0.075, 0.36)]), [0.09 * s, 0.095 * s, 0.1 * s])
        scene.paint(tail, second * 0.85, inflate(tail, 0.025 * s))
        wrap = scene.stroke(place([(-0.15, -0.02), (0, 0.052), (0.15, -0.02)]), [0.09 * s, 0.115 * s, 0.09 * s])
        scene.paint(wrap, second, inflate(wrap, 0.03 * s))


def paint_glasses(scene: Scene, head: Head) -> None:
    dark, rx, ry = rgb("#3a2d29"), head.rx, head.ry
    for side in (-1, 1):
        x, y = head.on(0.40 * side, 0.07, 1.0)
        w, h = 0.33 * rx * (0.3 + 0.7 * head.narrow(0.40 * side)), 0.215 * ry
        rim = scene.ellipse(x, y, w, h) * (1 - scene.ellipse(x, y, w - 0.05 * rx, h - 0.05 * rx))
        scene.paint(rim, dark, gloss=0.2)
    bridge = [head.on(-0.10, 0.03, 1.05), head.on(0, 0.0, 1.08), head.on(0.10, 0.03, 1.05)]
    scene.paint(scene.stroke(bridge, [0.05 * rx] * 3), dark, gloss=0.2)
    for side in head.ear_sides():
        x, y = head.ear(side)
        arm = scene.stroke([head.on(0.78 * side, 0.03), (x, y - 0.1 * ry)], [0.045 * rx] * 2)
        scene.paint(arm, dark)


def paint_earrings(scene: Scene, head: Head) -> None:
    r = 0.10 * head.rx
    for side in head.ear_sides():
        x, y = head.ear(side)
        drop = scene.ellipse(x, y + 0.27 * head.ry, r, r)
        scene.paint(drop, rgb("#eadfc8"), inflate(drop, 0.35 * r), gloss=1.0)


def paint_hat(scene: Scene, head: Head, person: Person) -> None:
    s, colour = head.unit, rgb(person.hat_colour)
    if person.hat == "beanie":
        outline = [
            (-1.12, -0.42),
            (-1.12, -0.85),
            (-0.7, -1.28),
            (0, -1.42),
            (0.7, -1.28),
            (1.12, -0.85),
            (1.12, -0.42),
            (0, -0.5),
        ]
        dome = scene.polygon(spline(head.points(outline, back=0.08)))
        scene.cast(dome, 0.015 * s)
        ribs = 1 + 0.10 * np.sin((scene.x - head.cx) / (0.012 * s))[..., None]
        scene.paint(dome, colour * ribs, inflate(dome, 0.04 * s))
        band = scene.stroke(head.points([(-1.16, -0.38), (0, -0.55), (1.16, -0.38)], back=0.08), [0.3 * head.ry] * 3)
        scene.paint(band, colour * 1.25 * ribs, inflate(band, 0.022 * s))
        x, y = head.at(-0.1 * head.turn, -1.5)
        ball = blur(scene.ellipse(x, y, 0.24 * head.rx, 0.24 * head.rx), 0.004 * s)
        scene.paint(ball, rgb("#e0d6ca"), inflate(ball, 0.025 * s))
    else:
        outline = [
            (-0.98, -0.55),
            (-0.92, -1.1),
            (-0.6, -1.4),
            (-0.15, -1.35),
            (0.15, -1.35),
            (0.6, -1.4),
            (0.92, -1.1),
            (0.98, -0.55),
            (0, -0.45),
        ]
        crown = scene.polygon(spline(head.points(outline, back=0.06)))
        outline = [
            (-1.6, -0.52),
            (-0.9, -0.72),
            (0, -0.76),
            (0.9, -0.72),
            (1.6, -0.52),
            (0.9, -0.42),
            (0, -0.36),
            (-0.9, -0.42),
        ]
        brim = scene.polygon(spline(head.points(outline, back=-0.12)))
        scene.cast(np.maximum(brim, crown), 0.03 * s)
        scene.paint(crown, colour, inflate(crown, 0.045 * s), gloss=0.05)
        band = scene.stroke(head.points([(-0.98, -0.68), (0, -0.66), (0.98, -0.68)], back=0.06), [0.2 * head.ry] * 3)
        scene.paint(band * crown, colour * 0.4)
        scene.paint(brim, colour * 1.05, inflate(brim, 0.02 * s), gloss=0.05)
