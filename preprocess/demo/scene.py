"""A relightable picture: layers of paint with surface normals, and the light that falls on them.

The demonstration portraits (`preprocess.demo`) are drawn with it. Geometry and paint are laid down once a
composition; `Scene.shade` then gives the picture under any light, so that two pictures of one composition
differ in light and in nothing else. numpy and Pillow only.

Conventions: arrays are float32 [H, W] or [H, W, 3]; colours are linear RGB; x points right, y down, z out of
the picture; masks are coverage in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_OVERSAMPLE = 3  # polygons are filled at this multiple and averaged down: antialiased edges
Point = tuple[float, float]


def rgb(code: str) -> np.ndarray:
    """A colour as a person writes it ("#c08040", sRGB), as linear float32 [3]."""
    value = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear [0, 1] to uint8 sRGB."""
    linear = np.clip(linear, 0, 1)
    code = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * code).astype(np.uint8)


def spline(points: Sequence[Point], closed: bool = True, steps: int = 12) -> list[Point]:
    """A Catmull-Rom curve through the points, as a polyline."""
    p = np.asarray(points, np.float64)
    if closed:
        before, after, last = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
        start = p
    else:
        ends = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        before, start, after, last = ends[:-3], ends[1:-2], ends[2:-1], ends[3:]
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (q[:, None] for q in (before, start, after, last))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    curve = curve.reshape(-1, 2)
    if not closed:
        curve = np.concatenate([curve, p[-1:]])
    return [tuple(q) for q in curve]


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian-like blur of [H, W] or [H, W, C] (three box filters), edges repeated; sigma in pixels."""
    radius = round(0.5 * (np.sqrt(4 * sigma**2 + 1) - 1))  # three boxes of 2r+1 have variance r(r+1)
    if radius < 1:
        return image
    if image.ndim == 3:
        return np.stack([blur(image[..., c], sigma) for c in range(image.shape[2])], axis=-1)
    size = 2 * radius + 1
    for _ in range(2):  # along rows, then along columns
        for _ in range(3):
            total = np.cumsum(np.pad(image, ((0, 0), (radius + 1, radius)), mode="edge"), axis=1)
            image = (total[:, size:] - total[:, :-size]) * np.float32(1 / size)
        image = np.ascontiguousarray(image.T)
    return image


def normals(height: np.ndarray) -> np.ndarray:
    """Unit surface normals [H, W, 3] of a height field in pixels."""
    dy, dx = np.gradient(height)
    n = np.stack([-dx, -dy, np.ones_like(dx)], axis=-1)
    return (n / np.linalg.norm(n, axis=-1, keepdims=True)).astype(np.float32)


def inflate(mask: np.ndarray, radius: float, strength: float = 2.5) -> np.ndarray:
    """Height in pixels of a cushion over the mask: rounded within about `radius` pixels of its edge."""
    box = _bounds(mask, margin=3 * radius + 3)
    height = np.zeros_like(mask)
    height[box] = strength * radius * blur(mask[box], radius)
    return height


def _bounds(mask: np.ndarray, margin: float = 0) -> tuple[slice, slice]:
    """The smallest box that holds every pixel above 0, grown by `margin` pixels."""
    slices = []
    for axis in (1, 0):
        used = np.flatnonzero(mask.any(axis=axis))
        first, last = (used[0], used[-1]) if len(used) else (0, 0)
        slices.append(slice(max(int(first - margin), 0), int(last + 1 + margin)))
    return slices[0], slices[1]


def cells(x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Round bumps [H, W] in [0, 1] on a jittered grid of `size` pixels: curls, foliage (Worley 1996)."""
    column, row = np.floor(x / size), np.floor(y / size)
    nearest = np.full(x.shape, 4.0, np.float32)
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            i, j = column + dx, row + dy
            # A hash from sines: the jitter of a cell is the same whichever pixel asks.
            jitter_x = 0.5 + 0.35 * np.sin(12.9898 * i + 78.233 * j)
            jitter_y = 0.5 + 0.35 * np.sin(39.3468 * i + 11.135 * j)
            nearest = np.minimum(nearest, (x / size - i - jitter_x) ** 2 + (y / size - j - jitter_y) ** 2)
    return np.sqrt(np.clip(1 - 1.3 * nearest, 0, 1))


@dataclasses.dataclass(frozen=True)
class Light:
    """How a scene is lit.

    Attributes:
      name: identifier, ground truth for whoever measures.
      towards: direction from the scene to the lamp (x right, y down, z out of the picture), any length.
      key: linear RGB of the lamp times its strength.
      ambient: linear RGB of the light from everywhere.
      falloff: how much brighter the picture's side near the lamp is, 0 to 1.
      shadow: darkness of cast shadows, 0 to 1.
    """

    name: str
    towards: tuple[float, float, float]
    key: tuple[float, float, float]
    ambient: tuple[float, float, float]
    falloff: float
    shadow: float


class Scene:
    """The layers painted so far, flattened: what a camera would see of paint and shape.

    Attributes:
      albedo: [H, W, 3] linear.
      normal: [H, W, 3] unit.
      gloss: [H, W] strength of highlights.
      occlusion: [H, W] share of the ambient light that arrives.
      exposure: factor on all light.
      casters: for each shape that throws a shadow: its mask with a soft edge, where that shadow is still seen (what was
        painted before the shape and not hidden since), and its lift above that in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.unit = float(min(height, width))
        self.albedo = np.zeros((height, width, 3), np.float32)
        self.normal = np.zeros((height, width, 3), np.float32)
        self.normal[..., 2] = 1
        self.gloss = np.zeros((height, width), np.float32)
        self.occlusion = np.ones((height, width), np.float32)
        self.exposure = 1.0
        self.casters: list[tuple[np.ndarray, np.ndarray, float]] = []
        self.y, self.x = np.mgrid[:height, :width].astype(np.float32)

    def polygon(self, *outlines: Sequence[Point]) -> np.ndarray:
        """Coverage [H, W] of the union of polygons, points in pixels."""
        mask = np.zeros((self.height, self.width), np.float32)
        points = np.concatenate([np.asarray(outline, np.float64) for outline in outlines])
        x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
        x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 2, (self.width, self.height))
        if x1 <= x0 or y1 <= y0:
            return mask
        image = Image.new("L", (int(x1 - x0) * _OVERSAMPLE, int(y1 - y0) * _OVERSAMPLE))
        draw = ImageDraw.Draw(image)
        for outline in outlines:
            draw.polygon([((x - x0) * _OVERSAMPLE, (y - y0) * _OVERSAMPLE) for x, y in outline], fill=255)
        mask[y0:y1, x0:x1] = np.asarray(image.reduce(_OVERSAMPLE), np.float32) / 255
        return mask

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
        """Coverage of an ellipse turned by `angle` radians."""
        t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        x, y = rx * np.cos(t), ry * np.sin(t)
        c, s = np.cos(angle), np.sin(angle)
        return self.polygon(list(zip(cx + c * x - s * y, cy + s * x + c * y)))

    def stroke(self, points: Sequence[Point], widths: Sequence[float]) -> np.ndarray:
        """Coverage of a smooth brush stroke; `widths` in pixels, one a point."""
        line = np.array(spline(points, closed=False))
        wide = np.interp(np.linspace(0, len(widths) - 1, len(line)), range(len(widths)), widths) / 2
        along = np.gradient(line, axis=0)
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
        side = np.stack([-along[:, 1], along[:, 0]], axis=1) * wide[:, None]
        return self.polygon([tuple(p) for p in np.concatenate([line + side, (line - side)[::-1]])])

    def spot(self, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        """A Gaussian spot of height 1 with standard deviations rx, ry in pixels."""
        return np.exp(-0.5 * (((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2))

    def paint(
        self,
        mask: np.ndarray,
        colour: np.ndarray,
        height: np.ndarray | None = None,
        gloss: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """Lays paint over the scene. Without `height` the shape beneath shows through (make-up, patterns)."""
        if not mask.any():
            return
        box = _bounds(mask, margin=1)  # the margin gives the height field neighbours at the shape's edge
        alpha = mask[box][..., None] * opacity
        if colour.ndim == 3:
            colour = colour[box]
        self.albedo[box] += alpha * (colour - self.albedo[box])
        if height is not None:
            self.normal[box] += alpha * (normals(height[box]) - self.normal[box])
            self.occlusion[box] += alpha[..., 0] * (1 - self.occlusion[box])
            for _, receiver, _ in self.casters:
                receiver[box] *= 1 - alpha[..., 0]  # this shape now hides what the shadow fell on
        if height is not None or gloss:
            self.gloss[box] += alpha[..., 0] * (gloss - self.gloss[box])

    def cast(self, mask: np.ndarray, lift: float) -> None:
        """Lets a shape `lift` pixels above what is painted so far shade it: contact and cast shadow.

        Call it just before the shape itself is painted.
        """
        self.occlusion *= 1 - 0.45 * blur(mask, 0.6 * lift + 1)
        self.casters.append((blur(mask, 0.35 * lift), np.ones_like(mask), lift))

    def defocus(self, sigma: float) -> None:
        """Blurs what is painted so far; sigma in pixels."""
        self.albedo, self.normal = blur(self.albedo, sigma), blur(self.normal, sigma)
        self.normal /= np.linalg.norm(self.normal, axis=-1, keepdims=True)
        self.gloss, self.occlusion = blur(self.gloss, sigma), blur(self.occlusion, sigma)

    def expose(self) -> None:
        """Sets the camera for this scene's paint, not for its light: a snow scene and a dark room come out alike."""
        luma = self.albedo @ np.array([0.2126, 0.7152, 0.0722], np.float32)
        self.exposure = float((0.19 / np.exp(np.mean(np.log(luma + 0.02)))) ** 0.7)

    def shade(self, light: Light) -> np.ndarray:
        """The picture under a light, uint8 [H, W, 3]."""
        towards = np.array(light.towards, np.float32)
        towards /= np.linalg.norm(towards)
        key, ambient = np.array(light.key, np.float32), np.array(light.ambient, np.float32)

        lambert = np.clip((self.normal @ towards + 0.25) / 1.25, 0, None)
        lambert = lambert * (0.5 + 0.5 * lambert)
        visible = np.ones_like(lambert)
        for mask, receiver, lift in self.casters:
            shift = -lift * towards[:2] / max(towards[2], 0.45)
            moved = _shifted(mask, shift[0], shift[1])
            visible *= 1 - light.shadow * moved * receiver
        # Near the lamp it is brighter: a linear ramp through the picture's centre.
        px = (self.x / self.width - 0.5) * 2
        py = (self.y / self.height - 0.5) * 2
        sideways = towards[:2] / max(float(np.hypot(*towards[:2])), 1e-3)
        ramp = 1 + light.falloff * (px * sideways[0] + py * sideways[1])

        diffuse = (lambert * visible * ramp)[..., None] * key
        sky = self.occlusion * (0.8 - 0.2 * self.normal[..., 1]) * (0.5 + 0.5 * ramp)
        half = towards + np.array([0, 0, 1], np.float32)
        half /= np.linalg.norm(half)
        shine = self.gloss * np.clip(self.normal @ half, 0, 1) ** 24 * visible
        linear = self.albedo * (diffuse + sky[..., None] * ambient) + 0.35 * shine[..., None] * key
        # A soft shoulder: strong light saturates like film instead of clipping.
        return to_srgb(1.08 * (1 - np.exp(-1.25 * self.exposure * linear)))


def _shifted(image: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """[H, W] moved by whole pixels, zeros coming in."""
    dx, dy = round(float(dx)), round(float(dy))
    out = np.zeros_like(image)
    h, w = image.shape
    out[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = image[
        max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out
