"""What the fields of the playground's page say, as arguments of `fluxdit_jax.sample` and from a picture's recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fluxdit_jax.sampling.arguments import DEFAULTS
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.sampling.recipe import Recipe

NEWEST = "newest"
MAX_PROMPT = 20_000  # characters
MAX_PICTURES = 64


@dataclasses.dataclass(frozen=True)
class Form:
    """What the page asks to be drawn.

    Attributes:
      size: "WIDTHxHEIGHT".
      weights: FOLDER/STEP, as "ema/5000", or `NEWEST`.
      guidance: scales of the dataset's further conditions, by name.
      sweep_text, sweep_vision: scales with commas between them, or "".
      reference: a picture whose vision vector to take.
      vector: a `.npy` file of a vision vector, instead.
      recipe: a picture of `sample`, whose conditions besides the prompt are taken where the two above give none.
    """

    prompt: str
    size: str
    seed: int = DEFAULTS["seed"]
    count: int = DEFAULTS["count"]
    steps: int = DEFAULTS["steps"]
    method: str = DEFAULTS["method"]
    weights: str = NEWEST
    guidance_text: float = DEFAULTS["guidance_text"]
    guidance_vision: float = DEFAULTS["guidance_vision"]
    rescale: float = DEFAULTS["rescale"]
    guidance: dict[str, float] = dataclasses.field(default_factory=dict)
    sweep_text: str = ""
    sweep_vision: str = ""
    reference: Path | None = None
    vector: Path | None = None
    recipe: Path | None = None

    @property
    def sweeping(self) -> bool:
        """Whether it asks for a sheet over guidance scales."""
        return bool(self.sweep_text.strip() or self.sweep_vision.strip())

    def pictures(self) -> list[Form]:
        """A form for each picture, drawn alone, as `sample` with that seed draws it. A sheet is one.

        Raises:
          SampleError: too many, or too long a prompt.
        """
        if not 1 <= self.count <= MAX_PICTURES:
            raise SampleError(f"{self.count} pictures are asked for; 1 to {MAX_PICTURES} at once")
        if len(self.prompt) > MAX_PROMPT:
            raise SampleError(
                f"the prompt has {len(self.prompt):,} characters, of which an encoder would use some two thousand; "
                f"at most {MAX_PROMPT:,}"
            )
        if self.sweeping:
            return [self]
        return [dataclasses.replace(self, count=1, seed=self.seed + number) for number in range(self.count)]

    def arguments(self) -> list[str]:
        """Of `fluxdit_jax.sample`, besides the model's, the encoders', the weights' and --out."""
        given = {
            "prompt": self.prompt,
            "size": self.size,
            "seed": self.seed,
            "count": self.count,
            "steps": self.steps,
            "method": self.method,
            "guidance-text": self.guidance_text,
            "guidance-vision": self.guidance_vision,
            "rescale": self.rescale,
        }
        further = [f"--guidance={name}={scale}" for name, scale in self.guidance.items()]
        for name in ("sweep-text", "sweep-vision"):
            scales = getattr(self, name.replace("-", "_")).strip()
            if not scales and self.recipe is not None:  # which may have a sheet's: one scale is none
                scales = str(given[name.replace("sweep", "guidance")])
            further += [f"--{name}={scales}"] if scales else []
        if self.recipe is not None:
            further.append(f"--recipe={self.recipe}")
        if self.reference is not None:
            further.append(f"--reference={self.reference}")
        elif self.vector is not None:
            further.append(f"--condition=vision={self.vector}")
        return [f"--{name}={value}" for name, value in given.items()] + further

    @classmethod
    def of_recipe(cls, recipe: Recipe, path: Path, weights: list[str], sizes: list[str]) -> tuple[Form, list[str]]:
        """The form that draws a picture again, and what of it could not be taken over, in words.

        Args:
          path: of the picture, whose conditions are taken.
          weights, sizes: those that can be chosen.
        """
        told, its = [], recipe.arguments
        chosen, size = f"{its['weights']}/{its['step']}", its["size"]
        if chosen not in weights:
            told.append(f"its weights, {chosen}, are not here: the newest are chosen, which draw another picture")
            chosen = NEWEST
        if size not in sizes:
            told.append(f"its size, {size}, is not one of this model's")
            size = sizes[0]
        if len(its["prompt"]) > 1:
            told.append(f"it is a sheet of {len(its['prompt'])} prompts, of which the first is taken")

        def scales(name: str) -> str:
            return ",".join(f"{scale:g}" for scale in its[name] or ())

        form = cls(
            prompt=its["prompt"][0],
            size=size,
            weights=chosen,
            guidance=dict(its.get("guidance", {})),
            sweep_text=scales("sweep_text"),
            sweep_vision=scales("sweep_vision"),
            recipe=path if recipe.given else None,
            **{name: its[name] for name in _PLAIN},
        )
        return dataclasses.replace(form, count=min(form.count, MAX_PICTURES)), told


_PLAIN = ("seed", "count", "steps", "method", "guidance_text", "guidance_vision", "rescale")
