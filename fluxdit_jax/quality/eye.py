"""What looks at the drawn pictures: the dataset's own vision encoder, given them as `build` gave it the dataset's."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.sampling.prompts import check_encoder

if TYPE_CHECKING:
    from preprocess.encoders import VisionEncoder

STAND_IN = "builtin:tone"
BATCH = 16  # pictures at once


@dataclasses.dataclass(frozen=True)
class Eye:
    """A vision encoder that looks at drawn pictures.

    Attributes:
      encoder: makes the vectors.
      own: whether it is the one that made the dataset's, so that those compare.
      scale: sides of the pictures it was shown over those of the dataset.
      note: what is to be said of it, in words; or "".
    """

    encoder: VisionEncoder
    own: bool
    scale: float
    note: str = ""

    @classmethod
    def open(cls, manifest: Manifest, spec: str | None = None, device: str = "auto") -> Eye:
        """The encoder of a dataset; where it is not on this machine, `builtin:tone`, which sees colour and light only.

        Args:
          spec: id or directory instead of the one that the dataset names.

        Raises:
          PreprocessError: `spec` cannot be loaded.
          SampleError: `spec` is another encoder.
        """
        from preprocess import PreprocessError
        from preprocess.encoders import load_vision_encoder

        scale = manifest.vision_resolution / manifest.resolution if manifest.vision_resolution else 1.0
        try:
            encoder = load_vision_encoder(spec or manifest.vision.spec, device, manifest.vision.dtype or "auto")
        except PreprocessError as error:
            if spec or "--device" in str(error):
                raise
            note = (
                f"the dataset's vision encoder is not here, so {STAND_IN} looks at the pictures: it sees colours and "
                f"light and no objects. Give the encoder with --vision-encoder ({str(error).splitlines()[0]})"
            )
            return cls(load_vision_encoder(STAND_IN), False, 1.0, note)
        check_encoder(encoder.identity, manifest.vision, "--vision-encoder")
        return cls(encoder, True, scale)

    def vectors(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3] of any sizes to f32 [n, V], unit L2, in order."""
        by_size = collections.defaultdict(list)
        for position, image in enumerate(images):
            by_size[image.shape].append(position)
        found: dict[int, np.ndarray] = {}
        for positions in by_size.values():
            for start in range(0, len(positions), BATCH):
                part = positions[start : start + BATCH]
                batch = np.stack([self._shown(images[position]) for position in part])
                found.update(zip(part, self.encoder.encode(batch), strict=True))
        return np.stack([found[position] for position in range(len(images))])

    def _shown(self, image: np.ndarray) -> np.ndarray:
        """The picture at the size at which the dataset's were shown."""
        if self.scale == 1.0:
            return image
        height, width = (round(side * self.scale) for side in image.shape[:2])
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
