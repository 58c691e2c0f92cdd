"""Hair: a layer behind the head and a layer over it, for each style of the cast."""

from __future__ import annotations

import numpy as np

from preprocess.demo.cast import Person
from preprocess.demo.head import Head
from preprocess.demo.scene import Scene, blur, cells, inflate, rgb, spline

# Style: hairline (head units, -1 is the top), longitude of its sides, size of the cap against the skull.
_CUT = {
    "curls": (-0.50, 1.05, 1.12),
    "bun": (-0.55, 1.10, 1.07),
    "afro": (-0.50, 1.15, 1.10),
    "braids": (-0.42, 1.02, 1.10),
    "short": (-0.56, 1.08, 1.09),
}


def hair_behind(scene: Scene, head: Head, person: Person) -> np.ndarray:
    """Mask of the hair that the head hides in part."""
    if person.hair == "curls":
        angles = np.linspace(-0.45, np.pi + 0.45, 16)
        return _curls(scene, head, [(a, 1.0 + 0.14 * np.sin(a)) for a in angles], 0.30)
    if person.hair == "afro":
        x, y = head.at(-0.12 * head.turn, -0.30)
        return scene.ellipse(x, y, 1.42 * head.rx, 1.10 * head.ry)
    if person.hair == "bun":
        x, y = head.at(-0.40 * head.turn, -1.10)
        return scene.ellipse(x, y, 0.46 * head.rx, 0.34 * head.ry)
    return np.zeros((scene.height, scene.width), np.float32)


def hair_over(scene: Scene, head: Head, person: Person) -> np.ndarray:
    """Mask of the hair that covers the skull."""
    top, side, grow = _CUT[person.hair]
    mask = skull_cap(scene, head, grow)
    if person.hair == "curls":
        mask = np.maximum(mask, _curls(scene, head, [(a, 0.98) for a in np.linspace(0.1, np.pi - 0.1, 9)], 0.27))
    mask = mask * (1 - _face_opening(scene, head, top, side))
    if person.hair in ("short", "bun", "afro"):
        mask = mask * _trimmed(scene, head, 0.10 if person.hair == "short" else 0.18)
    if person.hair == "braids":
        mask = mask * _trimmed(scene, head, 0.45)
        for side in (-1, 1):
            for k in range(6):
                x, y = head.at(side * (1.02 + 0.03 * k) - 0.12 * head.turn, 0.45 + 0.24 * k)
                mask = np.maximum(mask, scene.ellipse(x, y, 0.19 * head.rx, 0.165 * head.ry))
    return mask


def paint_hair(scene: Scene, head: Head, person: Person, mask: np.ndarray, shade: float = 1.0) -> None:
    """Paints a mask as hair: strands from the crown, or waves for curls."""
    s = head.unit
    x, y = head.at(-0.15 * head.turn, -1.0)
    dx, dy = scene.x - x, scene.y - y
    curly = person.hair in ("curls", "afro")
    if curly:
        bumps = cells(dx, dy, (0.062 if person.hair == "curls" else 0.036) * s)
        strands, lift, gloss = 2.2 * bumps - 1.5, 0.012, 0.06
    else:
        angle, far = np.arctan2(dy, dx), np.hypot(dx, dy) / s
        strands = 0.6 * np.sin(31 * angle + 3 * np.sin(9 * far)) + 0.4 * np.sin(67 * angle + 5 * far)
        strands, lift, gloss = strands * np.clip(far / 0.15, 0, 1), 0.0018, 0.2
    height = inflate(mask, 0.045 * s, 2.2) + 0.6 * inflate(mask, 0.014 * s, 2.2)
    height = height + lift * s * strands
    colour = rgb(person.hair_colour) * shade * (1 + 0.14 * strands[..., None])
    scene.paint(mask, colour, height, gloss)


def skull_cap(scene: Scene, head: Head, grow: float) -> np.ndarray:
    """The skull with hair on it, `grow` times its size: shifted to the back of a turned head."""
    x, y = head.at(-0.10 * head.turn, -0.12)
    return scene.ellipse(x, y, grow * head.rx, grow * 0.96 * head.ry)


def _face_opening(scene: Scene, head: Head, top: float, side: float) -> np.ndarray:
    """Where hair leaves the face free: hairline at v = `top`, sides at longitude ±`side`."""
    line = ((-side, 1.5), (-side, 0.2), (-0.8 * side, -0.3), (-0.45, top + 0.06), (0.0, top - 0.03),
            (0.45, top + 0.05), (0.8 * side, -0.3), (side, 0.2), (side, 1.5))  # fmt: skip
    points = []
    for longitude, v in line:
        turned = longitude + head.yaw
        u = np.sqrt(max(1 - 0.3 * min(v, 1) ** 2, 0.3)) * np.sin(np.clip(turned, -1.5, 1.5))
        # Past the profile there is no hair in front of the face: move that side out of the way.
        u += 1.6 * max(abs(turned) - 1.35, 0) * np.sign(longitude)
        points.append(head.at(u, v))
    return scene.polygon(spline(points))


def _trimmed(scene: Scene, head: Head, v: float) -> np.ndarray:
    """1 above the line where short hair ends: sideburns at `v`, lower at the nape of a turned head."""
    u = (scene.x - head.cx) / head.rx
    nape = v + 0.50 * np.clip(-u * head.turn - 0.55, 0, 1) if head.turn else v
    return np.clip((head.cy + nape * head.ry - scene.y) / (0.07 * head.ry) + 0.5, 0, 1)


def _curls(scene: Scene, head: Head, places: list[tuple[float, float]], radius: float) -> np.ndarray:
    """A union of discs at (angle, distance) around the head; angle 0 is right, pi/2 up."""
    mask = np.zeros((scene.height, scene.width), np.float32)
    for k, (angle, distance) in enumerate(places):
        x, y = head.at(-0.1 * head.turn + distance * np.cos(angle), -0.95 * distance * np.sin(angle))
        r = radius * (1 + 0.18 * np.sin(2.4 * k)) * head.rx
        mask = np.maximum(mask, scene.ellipse(x, y, r, r))
    return blur(mask, 0.002 * head.unit)
