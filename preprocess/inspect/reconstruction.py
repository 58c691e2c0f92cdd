"""What one VAE makes of pictures: how near its reconstructions come, and what its latents are like."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from skimage.metrics import structural_similarity

from fluxdit_jax.shared.psnr import psnr
from preprocess.build.statistics import Moments
from preprocess.encoders import Vae


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Of all latents of a VAE over some pictures; x is a latent less its channel's mean, over its channel's std.

    Attributes:
      std: the smallest and the largest standard deviation of a channel.
      directions: how many equally strong, independent channels would carry as much: the square of the sum of the
        eigenvalues of the channels' covariance over the sum of their squares.
      neighbours: correlation of x with x one position to the right and below, mean over channels.
      largest: the largest |x|.
    """

    std: tuple[float, float]
    directions: float
    neighbours: float
    largest: float

    @classmethod
    def of(cls, latents: Sequence[np.ndarray]) -> LatentStatistics:
        """Of float [C, h, w] each."""
        moments = Moments.merged(map(Moments.of, latents))
        assert moments is not None
        std = np.maximum(moments.std, 1e-12)
        channels = len(std)
        covariance, beside = np.zeros((channels, channels)), np.zeros(channels)
        pairs, largest = 0, 0.0
        for latent in latents:
            x = (latent.astype(np.float64) - moments.mean[:, None, None]) / std[:, None, None]
            flat = x.reshape(channels, -1)
            covariance += flat @ flat.T / moments.count
            for one, other in ((x[:, :, 1:], x[:, :, :-1]), (x[:, 1:], x[:, :-1])):
                beside += (one * other).sum((1, 2))
                pairs += one[0].size
            largest = max(largest, float(np.abs(x).max()))
        covariance *= np.outer(std, std)
        return cls(
            std=(float(moments.std.min()), float(moments.std.max())),
            directions=float(np.trace(covariance) ** 2 / max(np.square(covariance).sum(), 1e-24)),
            neighbours=float((beside / max(pairs, 1)).mean()),
            largest=largest,
        )


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """What one VAE made of K pictures.

    Attributes:
      images: uint8 [H, W, 3] each, decoded again.
      psnr: float64 [K], decibels; 99 for a picture that came back exactly.
      ssim: float64 [K], 1 for one that did; on RGB, with the window of Wang et al. 2004 (normal, sigma 1.5).
      latents: their statistics.
      latent_bytes: of a picture on disk, mean.
      encode_rate, decode_rate: pictures a second, all but each size's first batch if there are more.
    """

    images: list[np.ndarray]
    psnr: np.ndarray
    ssim: np.ndarray
    latents: LatentStatistics
    latent_bytes: float
    encode_rate: float
    decode_rate: float


def reconstruct(
    vae: Vae, pictures: Sequence[np.ndarray], batch_size: int, progress: Callable[[int], object]
) -> Reconstruction:
    """Encodes and decodes pictures uint8 [H, W, 3] of several sizes.

    Raises:
      PreprocessError: one does not fit the device.
    """
    by_size = collections.defaultdict(list)
    for position, picture in enumerate(pictures):
        by_size[picture.shape].append(position)
    images: dict[int, np.ndarray] = {}
    latents: dict[int, np.ndarray] = {}
    times: list[tuple[bool, int, float, float]] = []  # first of its size, pictures, seconds
    for positions in by_size.values():
        for start in range(0, len(positions), batch_size):
            batch = positions[start : start + batch_size]
            begin = time.perf_counter()
            encoded = vae.encode(np.stack([pictures[position] for position in batch]))
            middle = time.perf_counter()
            decoded = vae.decode(encoded)
            times.append((start == 0, len(batch), middle - begin, time.perf_counter() - middle))
            latents.update(zip(batch, encoded, strict=True))
            images.update(zip(batch, decoded, strict=True))
            progress(len(batch))
    counted = [each for each in times if not each[0]] or times
    count = sum(each[1] for each in counted)
    pairs = [(picture, images[position]) for position, picture in enumerate(pictures)]
    return Reconstruction(
        images=[image for _, image in pairs],
        psnr=np.array([psnr(*pair) for pair in pairs]),
        ssim=np.array([_ssim(*pair) for pair in pairs]),
        latents=LatentStatistics.of(list(latents.values())),
        latent_bytes=float(np.mean([latent.nbytes for latent in latents.values()])),
        encode_rate=count / sum(each[2] for each in counted),
        decode_rate=count / sum(each[3] for each in counted),
    )


def _ssim(truth: np.ndarray, image: np.ndarray) -> float:
    return float(
        structural_similarity(
            truth, image, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )
