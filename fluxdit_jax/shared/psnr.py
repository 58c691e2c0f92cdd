"""How near a picture is to another one, pixel by pixel."""

from __future__ import annotations

import numpy as np
from skimage.metrics import peak_signal_noise_ratio


def psnr(truth: np.ndarray, image: np.ndarray) -> float:
    """Peak signal to noise ratio of two pictures of one size, uint8, decibels; at most 99 (equal pictures)."""
    if np.array_equal(truth, image):
        return 99.0
    return min(99.0, float(peak_signal_noise_ratio(truth, image, data_range=255)))
