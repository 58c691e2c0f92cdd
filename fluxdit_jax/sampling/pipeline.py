"""From conditions to latents: the network, the solver and guidance as one compiled function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxdit_jax.dataset.fields import BF16, CAPTION, field_named
from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.model import dit
from fluxdit_jax.model.conditions import Condition, given
from fluxdit_jax.model.patches import unpatchify
from fluxdit_jax.objective import patch_statistics, valid_tokens
from fluxdit_jax.portable.noise import normal
from fluxdit_jax.sampling import solvers
from fluxdit_jax.settings import Settings

Conditions = dict[str, np.ndarray]


def conditions(
    kinds: Sequence[Condition], wanted: Sequence[Mapping[str, np.ndarray | None]], grids: list[tuple[int, int]]
) -> Conditions:
    """Stacks what pictures are asked to be. No sequence is cut: T is the longest.

    Args:
      kinds: the conditions of the network.
      wanted: per picture its conditions by name: sequences bf16 [n, E], unit vectors f32 [V]; one that is missing, None
        or empty is not given.
      grids: per picture (rows, columns) of tokens.

    Returns:
      grid int32 [B, 2]; of each sequence NAME bf16 [B, T, E] and NAME_length int32 [B], of each vector f32 [B, V]; of
      both keep_NAME bool [B].
    """
    stacked: Conditions = {"grid": np.asarray(grids, np.int32)}
    for kind in kinds:
        values = [one.get(kind.name) for one in wanted]
        values = [None if value is None or not len(value) else value for value in values]
        stacked[f"keep_{kind.name}"] = np.asarray([value is not None for value in values])
        if kind.sequence:
            lengths = [1 if value is None else len(value) for value in values]
            stacked[f"{kind.name}_length"] = np.asarray(lengths, np.int32)
            stacked[kind.name] = np.zeros((len(values), max(lengths), kind.width), BF16)
        else:
            stacked[kind.name] = np.zeros((len(values), kind.width), np.float32)
        for row, value in enumerate(values):
            if value is not None:
                stacked[kind.name][(row, slice(len(value))) if kind.sequence else row] = value
    return stacked


def besides_captions(kinds: Sequence[Condition]) -> list[str]:
    """Names of the conditions that are not made from the caption."""
    return [kind.name for kind in kinds if field_named(kind.name).made_from != CAPTION]


def grid_of(record: Record, patch: int) -> tuple[int, int]:
    """(rows, columns) of the tokens of a record's latent."""
    _, h, w = record.latent.shape
    return h // patch, w // patch


def record_conditions(
    kinds: Sequence[Condition], records: list[Record], patch: int, text_limit: int | None
) -> Conditions:
    """The conditions that describe stored records, their captions cut where training cuts them."""
    wanted = [record.conditions | {"text": record.text[:text_limit]} for record in records]
    return conditions(kinds, wanted, [grid_of(record, patch) for record in records])


class Generator:
    """Samples latents from EMA weights.

    Every picture is a sequence of `tokens` tokens, so one program serves all sizes and aspect ratios.

    Attributes:
      batch_size: pictures computed at once.
    """

    def __init__(
        self,
        config: dit.ModelConfig,
        *,
        tokens: int,
        lengths: dict[str, int],
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
          lengths: tokens that each sequence is padded to in training. A longer one is padded to twice as many, four
            times as many and so on: each of these lengths is a program of its own.
          statistics: `objective.patch_statistics` of the training data set.
          steps, method: see `solvers.integrate`.
          batch_size: pictures computed at once.
          graph: of another network with the same interface; None: `dit.build(config)`'s.
        """
        graph = dit.build(config)[0] if graph is None else graph
        self._config = config
        self._tokens, self._lengths = tokens, lengths
        self.batch_size = batch_size
        self._statistics = statistics
        sampler = _make_sampler(graph, config.conditions, shift, steps, method)
        self._run = jax.jit(sampler, static_argnames="guided")

    @classmethod
    def of(cls, settings: Settings, manifest: Manifest, **how: Any) -> Generator:
        """What a run's or an export's weights are drawn with; `how` are steps, method, batch_size, graph."""
        return cls(
            settings.model,
            tokens=settings.tokens,
            lengths=settings.batch.lengths,
            shift=settings.flow.shift,
            statistics=patch_statistics(manifest.latent_mean, manifest.latent_std, settings.model.patch),
            **how,
        )

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What the network is given."""
        return self._config.conditions

    @property
    def patch(self) -> int:
        """Side of a token in latent pixels."""
        return self._config.patch

    def cast(self, ema: Any) -> Any:
        """EMA weights f32 -> the compute dtype, on the device."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, self._config.dtype), ema)

    def noise(self, seeds: list[int]) -> np.ndarray:
        """Starting noise f32 [B, N, P]; a picture's noise depends on its own seed only."""
        return np.stack([normal(seed, (self._tokens, self._config.token_width)) for seed in seeds])

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
        result: dict[int, np.ndarray] = {}
        for batch in self.batches(params, wanted, noise_BxNxP, guidance):
            result |= batch
            if progress is not None:
                progress(len(batch))
        return [result[row] for row in range(len(noise_BxNxP))]

    def batches(
        self,
        params: Any,
        wanted: Conditions,
        noise_BxNxP: np.ndarray,
        guidance: solvers.Guidance = solvers.Guidance(),  # noqa: B008  frozen
    ) -> Iterator[dict[int, np.ndarray]]:
        """`latents` by row, a batch at a time, as they are done: those of short captions first."""
        mean_P, std_P = self._statistics
        given_at_all = tuple(c.name for c in self._config.conditions if wanted[f"keep_{c.name}"].any())
        guided = () if guidance.plain else given_at_all
        scales = np.array([guidance.of(name) for name in guided], np.float32)
        for rows, lengths in self._batches(wanted):
            done = len(rows)
            rows = rows[np.arange(self.batch_size).clip(max=done - 1)]  # the last batch is filled up
            part = {name: array[rows] for name, array in wanted.items()}
            part |= {name: _padded(part[name], length) for name, length in lengths.items()}
            rescale = np.float32(guidance.rescale)
            tokens = np.asarray(self._run(params, part, noise_BxNxP[rows], scales, rescale, guided=guided))
            tokens = tokens * std_P + mean_P
            grids = part["grid"].tolist()
            yield {
                int(rows[row]): unpatchify(tokens[row], tuple(grids[row]), self._config.patch) for row in range(done)
            }

    def _batches(self, wanted: Conditions) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
        """Rows of a batch and the tokens that their sequences are padded to, by name.

        A long sequence never shares its batch with a short one: padding may round differently, and a picture must not
        depend on what is drawn beside it.
        """
        names = [c.name for c in self._config.sequences]
        padded = []
        for name in names:
            usual = self._lengths[name]
            times = np.maximum(1, -(-wanted[f"{name}_length"] // usual))
            padded.append(usual * 2 ** np.ceil(np.log2(times)).astype(int))
        lengths = np.stack(padded, axis=1)
        for each in np.unique(lengths, axis=0):
            rows = np.flatnonzero((lengths == each).all(axis=1))
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size], dict(zip(names, each.tolist(), strict=True))


def _padded(tokens_BxTxE: np.ndarray, length: int) -> np.ndarray:
    """[B, length, E]: zeros after the tokens, or without the padding beyond `length`."""
    missing = max(0, length - tokens_BxTxE.shape[1])
    return np.pad(tokens_BxTxE[:, :length], ((0, 0), (0, missing), (0, 0)))


def _make_sampler(
    graph: Any, kinds: Sequence[Condition], shift: float, steps: int, method: str
) -> Callable[..., jax.Array]:
    def run(
        params: Any,
        wanted: dict[str, jax.Array],
        noise: jax.Array,
        scales: jax.Array,
        rescale: jax.Array,
        *,
        guided: tuple[str, ...],
    ) -> jax.Array:
        """With `guided` empty the model itself; else guided, the conditions added one by one in this order."""
        times = 1 + len(guided)

        def repeated(array: jax.Array) -> jax.Array:
            return jnp.concatenate([array] * times)

        asked = {name: repeated(array) for name, array in wanted.items()}
        valid = valid_tokens(asked["grid"], noise.shape[1])[..., None]
        keep = {}
        for kind in kinds:
            kept = wanted[f"keep_{kind.name}"]
            since = guided.index(kind.name) + 1 if kind.name in guided else 0
            keep[kind.name] = jnp.concatenate([jnp.zeros_like(kept)] * since + [kept] * (times - since))
        given_conditions = given(kinds, asked, keep)

        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            times_B = jnp.full((x.shape[0] * times,), t)
            v = dit.apply(graph, params, repeated(x), times_B, asked["grid"], given_conditions)
            v = jnp.where(valid, v, 0.0)
            return solvers.guide(jnp.split(v, times), scales, rescale) if guided else v

        first = jnp.where(valid[: noise.shape[0]], noise, 0.0)
        return solvers.integrate(velocity, first, steps, shift, method)

    return run
