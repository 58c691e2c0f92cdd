"""The light changes of a gate set: what each multiplies the picture by, in linear light.

No factor is above 1, so nothing is clipped, and detail stays visible in the darkest part.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Light:
    """A change of the light of a picture.

    Attributes:
      name: in the set's grid, in file names and reports.
      colour: factors of linear red, green and blue, at most 1.
      towards: (x, y) of the side that it comes from: (1, 0) the right, (0, -1) above; (0, 0) from everywhere.
    """

    name: str
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    towards: tuple[int, int] = (0, 0)


# In the order in which `--lights L` takes them. How far each is from the others decides whether a vision encoder that
# sees colour and brightness tells them apart on photographs whose own light differs.
LIGHTS = (
    Light("none"),
    Light("warm", (1.0, 0.45, 0.1)),
    Light("cool", (0.1, 0.4, 1.0)),
    Light("dim", (0.1, 0.1, 0.1)),
    Light("magenta", (1.0, 0.15, 0.7)),
    Light("right", towards=(1, 0)),
    Light("left", towards=(-1, 0)),
    Light("green", (0.15, 1.0, 0.25)),
    Light("above", towards=(0, -1)),
    Light("below", towards=(0, 1)),
)
FALL = 5.0  # stops between the lit side of a picture and the opposite one

_CODES = np.arange(256) / 255
# sRGB to linear light and back (IEC 61966-2-1)
_LINEAR = np.where(_CODES <= 0.04045, _CODES / 12.92, ((_CODES + 0.055) / 1.055) ** 2.4)


def lit(pixels: np.ndarray, light: Light) -> np.ndarray:
    """The picture under a light: uint8 [H, W, 3] to uint8 [H, W, 3]."""
    height, width, _ = pixels.shape
    linear = _LINEAR[pixels] * np.asarray(light.colour)
    x, y = light.towards
    if x or y:
        across = (np.arange(width) + 0.5) / width if x else (np.arange(height) + 0.5) / height
        far = 1 - across if x + y > 0 else across
        fall = np.exp2(-FALL * far)
        linear *= fall[None, :, None] if x else fall[:, None, None]
    code = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * code).astype(np.uint8)
