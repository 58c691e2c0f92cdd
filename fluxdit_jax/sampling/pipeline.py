"""From conditions to latents: the network, the solver and guidance as one compiled function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxdit_jax.dataset.records import BF16, Record
from fluxdit_jax.model import dit
from fluxdit_jax.model.patches import unpatchify
from fluxdit_jax.sampling import solvers
from fluxdit_jax.train_step import valid_tokens

Conditions = dict[str, np.ndarray]


def conditions(
    text: list[np.ndarray],
    vision: list[np.ndarray | None],
    grids: list[tuple[int, int]],
    vision_width: int,
) -> Conditions:
    """Stacks what a picture is asked to be. No text is cut: T is the longest.

    Args:
      text: per picture its text tokens bf16 [n, E]; empty means no caption.
      vision: per picture its unit vector f32 [V], or None for no reference.
      grids: per picture (rows, columns) of tokens.

    Returns:
      text bf16 [B, T, E], text_length int32, vision f32 [B, V], keep_text bool, keep_vision bool, grid int32 [B, 2].
    """
    padded = np.zeros((len(text), max(1, *map(len, text)), text[0].shape[1]), BF16)
    for row, tokens in enumerate(text):
        padded[row, : len(tokens)] = tokens
    zero = np.zeros(vision_width, np.float32)
    return {
        "text": padded,
        "text_length": np.asarray([max(1, len(tokens)) for tokens in text], np.int32),
        "vision": np.stack([zero if vector is None else vector for vector in vision]),
        "keep_text": np.asarray([len(tokens) > 0 for tokens in text]),
        "keep_vision": np.asarray([vector is not None for vector in vision]),
        "grid": np.asarray(grids, np.int32),
    }


def record_conditions(records: list[Record], patch: int, text_limit: int | None) -> Conditions:
    """The conditions that describe stored records, their captions cut where training cuts them."""
    return conditions(
        [record.text[:text_limit] for record in records],
        [record.vision for record in records],
        [(record.latent.shape[1] // patch, record.latent.shape[2] // patch) for record in records],
        len(records[0].vision),
    )


class Generator:
    """Samples latents from EMA weights.

    Every picture is a sequence of `tokens` tokens, so one program serves all sizes and aspect ratios.
    """

    def __init__(
        self,
        config: dit.ModelConfig,
        *,
        tokens: int,
        text_tokens: int,
        shift: float,
        statistics: tuple[np.ndarray, np.ndarray],
        steps: int,
        batch_size: int,
        method: str = "heun",
        graph: Any = None,
    ):
        """
        Args:
          tokens: sequence length; the largest rows * columns that will be asked for.
          text_tokens: text tokens that a caption is padded to in training. A longer text is padded to twice as
            many, four times as many and so on: each of these lengths is a program of its own.
          statistics: `train_step.patch_statistics` of the training data set.
          steps, method: see `sampler.integrate`.
          batch_size: pictures computed at once.
          graph: of another network with the same interface; None: `model.build(config)`'s.
        """
        graph = dit.build(config)[0] if graph is None else graph
        self._config = config
        self._tokens, self._text_tokens = tokens, text_tokens
        self._batch_size = batch_size
        self._statistics = statistics
        self._run = jax.jit(_make_sampler(graph, shift, steps, method), static_argnames="plain")

    def cast(self, ema: Any) -> Any:
        """EMA weights f32 -> the compute dtype, on the device."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, self._config.dtype), ema)

    def noise(self, seeds: list[int]) -> np.ndarray:
        """Starting noise f32 [B, N, P]; a picture's noise depends on its own seed only."""
        shape = (self._tokens, self._config.token_width)
        draw = jax.jit(jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape)))
        return np.asarray(draw(np.asarray(seeds, np.uint32)))

    def latents(
        self,
        params: Any,
        wanted: Conditions,
        noise_BxNxP: np.ndarray,
        progress: Callable[[int], Any] | None = None,
        guidance: solvers.Guidance = solvers.Guidance(),  # noqa: B008  frozen
    ) -> list[np.ndarray]:
        """Samples one latent per row of `wanted`, f32 [C, h, w] in VAE space, in order.

        Args:
          params: of `cast`.
          progress: called with the number of pictures done after each batch.
          guidance: other scales need no new compilation.
        """
        mean_P, std_P = self._statistics
        result: dict[int, np.ndarray] = {}
        for rows, text_tokens in self._batches(wanted["text_length"]):
            done = len(rows)
            rows = rows[np.arange(self._batch_size).clip(max=done - 1)]  # the last batch is filled up
            part = {name: array[rows] for name, array in wanted.items()}
            part["text"] = _padded(part["text"], text_tokens)
            scales = np.array([guidance.text, guidance.vision, guidance.rescale], np.float32)
            tokens = np.asarray(self._run(params, part, noise_BxNxP[rows], scales, plain=guidance.plain))
            tokens = tokens * std_P + mean_P
            for row in range(done):
                height, width = part["grid"][row].tolist()
                result[rows[row]] = unpatchify(tokens[row], (height, width), self._config.patch)
            if progress is not None:
                progress(done)
        return [result[row] for row in range(len(noise_BxNxP))]

    def _batches(self, text_length_B: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Rows of a batch and the text tokens that all of them are padded to.

        A long text never shares its batch with a short one: padding may round differently, and a picture must not
        depend on what is drawn beside it.
        """
        times = np.maximum(1, -(-text_length_B // self._text_tokens))
        lengths = self._text_tokens * 2 ** np.ceil(np.log2(times)).astype(int)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            for start in range(0, len(rows), self._batch_size):
                yield rows[start : start + self._batch_size], int(length)


def _padded(text_BxTxE: np.ndarray, length: int) -> np.ndarray:
    """[B, length, E]: zeros after the text, or without the padding beyond `length`."""
    missing = max(0, length - text_BxTxE.shape[1])
    return np.pad(text_BxTxE[:, :length], ((0, 0), (0, missing), (0, 0)))


def _make_sampler(graph: Any, shift: float, steps: int, method: str) -> Callable[..., jax.Array]:
    def run(
        params: Any, wanted: dict[str, jax.Array], noise: jax.Array, scales_3: jax.Array, *, plain: bool
    ) -> jax.Array:
        valid = valid_tokens(wanted["grid"], noise.shape[1])[..., None]

        def evaluate(
            x: jax.Array, t: jax.Array, keep_text: jax.Array, keep_vision: jax.Array, repeats: int = 1
        ) -> jax.Array:
            def repeat(array: jax.Array) -> jax.Array:
                return jnp.concatenate([array] * repeats)

            v = dit.apply(
                graph,
                params,
                repeat(x),
                jnp.full((x.shape[0] * repeats,), t),
                repeat(wanted["grid"]),
                repeat(wanted["text"]),
                repeat(wanted["text_length"]),
                repeat(wanted["vision"]),
                keep_text,
                keep_vision,
            )
            return jnp.where(repeat(valid), v, 0.0)

        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            keep_text, keep_vision = wanted["keep_text"], wanted["keep_vision"]
            if plain:
                return evaluate(x, t, keep_text, keep_vision)
            off = jnp.zeros_like(keep_text)
            v = evaluate(
                x,
                t,
                jnp.concatenate([off, keep_text, keep_text]),
                jnp.concatenate([off, off, keep_vision]),
                repeats=3,
            )
            return solvers.guide(*jnp.split(v, 3), *scales_3)

        return solvers.integrate(velocity, jnp.where(valid, noise, 0.0), steps, shift, method)

    return run
