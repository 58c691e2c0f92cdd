"""Whether a gate set can be learned at all: does the vision encoder see the lights, do the latents differ enough?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.shared.distances import root_mean_squares

SEEN = 0.6  # share of a light's pictures that must be retrieved, else the encoder does not see it
_FAINT = 0.05  # what a light moves a vector by, against what another photograph does, below which it is warned of
_RIDGE = 1e-3  # of the probe, against the mean power of a vector
_NEAR = 0.1  # distance of two latents, against the usual one, below which they are hard to tell apart


@dataclasses.dataclass(frozen=True)
class Lights:
    """How well lights are read from vision vectors.

    Attributes:
      retrieved: share of the pictures of each light whose light the probe names, by light.
      chance: one in the number of lights.
      unaided: share of all pictures whose light is named from the vector as it is, without knowing the photograph.
      strength: how far a light moves a vector against how far another photograph does, root mean squares.
    """

    retrieved: dict[str, float]
    chance: float
    unaided: float
    strength: float

    @property
    def unseen(self) -> list[str]:
        """The lights that the encoder does not see."""
        return [light for light, share in self.retrieved.items() if share < SEEN]


def separate_lights(vectors: np.ndarray, places: Sequence[Place]) -> Lights | None:
    """Retrieves the light of each picture from what the light changes in its vector, as other photographs taught it.

    What is changed is the vector without the mean over all lights of the same photograph and view. Ridge regression
    of the changes to one-hot lights is fitted to all photographs but one and asked about that one.

    Args:
      vectors: [N, V], unit norm.
      places: of the pictures.

    Returns:
      None if there are fewer than two photographs or lights.
    """
    photographs = np.array([place.photograph for place in places])
    names = list(dict.fromkeys(place.light for place in places))
    lights = np.array([names.index(place.light) for place in places])
    if len(names) < 2 or len(set(photographs)) < 2:
        return None
    rows = np.unique([f"{place.photograph}\n{place.view}" for place in places], return_inverse=True)[1]
    vectors = vectors.astype(np.float64)
    means = np.array([vectors[rows == row].mean(0) for row in range(rows.max() + 1)])
    changes = vectors - means[rows]
    right = _probed(changes, lights, photographs) == lights
    unaided = _probed(vectors, lights, photographs) == lights
    return Lights(
        {name: float(right[lights == k].mean()) for k, name in enumerate(names)},
        1 / len(names),
        float(unaided.mean()),
        float(np.sqrt(np.square(changes).sum(1).mean() / max(np.square(means - means.mean(0)).sum(1).mean(), 1e-12))),
    )


def _probed(values: np.ndarray, lights: np.ndarray, photographs: np.ndarray) -> np.ndarray:
    """int [N]: the light of each row of [N, V] by ridge regression to one-hot lights of all other photographs."""
    found = np.zeros(len(lights), int)
    count = lights.max() + 1
    for photograph in sorted(set(photographs)):
        asked = photographs == photograph
        mean = values[~asked].mean(0)
        known = values[~asked] - mean
        kernel = known @ known.T
        ridge = max(_RIDGE * np.trace(kernel) / len(kernel), 1e-12)
        targets = np.eye(count)[lights[~asked]] - 1 / count
        weights = np.linalg.solve(kernel + ridge * np.eye(len(kernel)), targets)
        found[asked] = ((values[asked] - mean) @ known.T @ weights).argmax(1)
    return found


def light_lines(found: Lights | None, encoder: str) -> list[str]:
    """What is said of `separate_lights`."""
    if found is None:
        return ["lights: not measured, which takes two photographs under two lights"]
    shares = ", ".join(f"{light} {share:.0%}" for light, share in found.retrieved.items())
    lines = [
        f"lights that a linear probe, taught by other photographs, reads from what they change in the vectors of "
        f"{encoder}: {shares} (chance {found.chance:.0%}); from the vectors as they are {found.unaided:.0%}. A light "
        f"moves a vector {found.strength:.2f} times as far as another photograph does"
    ]
    if found.unseen or found.strength < _FAINT:
        which = ", ".join(found.unseen) or "light more than faintly"
        lines.append(
            f"  warning: {encoder} does not see {which}: the gate's vision swap cannot be expected to pass with it. "
            "Take another vision encoder, or fewer lights (--lights)"
        )
    return lines


@dataclasses.dataclass(frozen=True)
class Apart:
    """How far pictures are from the nearest other one, in normalised latents; 1 is the usual distance of two.

    Attributes:
      nearest: f64 [N], infinite for a picture whose size no other has.
      pair: rows of the two that are nearest; None if no two have one size.
    """

    nearest: np.ndarray
    pair: tuple[int, int] | None


def separate_latents(latents: Sequence[np.ndarray], std: Sequence[float]) -> Apart:
    """Distances of latents [C, h, w], of which those of different size count as apart.

    Args:
      std: per channel, of the data set.
    """
    nearest = np.full(len(latents), np.inf)
    pair, least, usual = None, np.inf, np.sqrt(2.0)  # two independent values of unit variance
    for shape in {latent.shape for latent in latents}:
        rows = [row for row, latent in enumerate(latents) if latent.shape == shape]
        scale = np.asarray(std)[:, None, None]
        flat = np.array([(latents[row].astype(np.float64) / scale).ravel() for row in rows])
        spans = root_mean_squares(flat, flat) / usual
        np.fill_diagonal(spans, np.inf)
        nearest[rows] = spans.min(1)
        if len(rows) > 1 and spans.min() < least:
            least = spans.min()
            first, second = np.unravel_index(spans.argmin(), spans.shape)
            pair = rows[int(first)], rows[int(second)]
    return Apart(nearest, pair)


def latent_lines(found: Apart, keys: Sequence[str]) -> list[str]:
    """What is said of `separate_latents`."""
    if found.pair is None:
        return ["latents: no two pictures have the same size, so all are told apart"]
    known = found.nearest[np.isfinite(found.nearest)]
    first, second = (keys[row] for row in found.pair)
    close = int((found.nearest < _NEAR).sum())
    lines = [
        f"latents: distance to the nearest other picture {np.median(known):.2f} in the median, {known.min():.2f} at "
        f"least ({first} and {second}); 1 is that of unrelated pictures"
    ]
    if close:
        lines.append(f"  warning: {close} pictures are within {_NEAR} of another and will take long to be told apart")
    return lines
