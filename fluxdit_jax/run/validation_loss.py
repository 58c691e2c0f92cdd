"""The held-out loss: the same pictures, times and noise at every visit, by the EMA, so that its points compare.

The training loss is measured on other pictures at other noise levels in every step; its wiggle is larger than
months of progress. This one moves only when the weights do.
Of a picture with several captions it takes the first, whatever `data.caption_weights` says.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxdit_jax import flow
from fluxdit_jax.device import sharding
from fluxdit_jax.loader.reader import BatchLayout, RecordSource, collate, spread
from fluxdit_jax.model import dit
from fluxdit_jax.model.conditions import given
from fluxdit_jax.objective import flow_loss, normalize_latents

# Far from the sample numbers of training, so that its noise is never the held-out noise.
_FIRST_INDEX = 2**31


# Compiled once for all that measure at one resolution: stages do so for each other.
@functools.partial(jax.jit, static_argnums=0)
def _measure(
    config: dit.ModelConfig, statistics: tuple[np.ndarray, np.ndarray], ema: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(sum of the losses, that by time, samples by time, the loss of each row) of a batch with times and weights."""
    graph, _ = dit.build(config)
    params = jax.tree.map(lambda p: p.astype(config.dtype), ema)
    x0, valid = normalize_latents(batch, *statistics)
    noise = flow.draw_noise(0, batch["index"], x0.shape[1:])
    keep = {c.name: jnp.ones_like(batch["index"], bool) for c in config.conditions}
    conditions = given(config.conditions, batch, keep)
    loss_B, *_ = flow_loss(graph, params, batch["grid"], conditions, x0, valid, batch["t"], noise)
    loss_B = loss_B * batch["weight"]
    bin_loss, bin_count = flow.loss_by_time(loss_B, batch["t"], batch["weight"])
    return jnp.sum(loss_B), bin_loss, bin_count, loss_B


class ValidationLoss:
    """Measures the flow loss on fixed draws: each picture once at each of a few fixed quantiles of time.

    Attributes:
      pictures: how many are measured.
    """

    def __init__(
        self,
        config: dit.ModelConfig,
        flow_config: flow.FlowConfig,
        source: RecordSource,
        *,
        mesh: jax.sharding.Mesh,
        statistics: tuple[np.ndarray, np.ndarray],
        layout: BatchLayout,
        batch_size: int,
        pictures: int,
        times: int = 8,
    ):
        """
        Args:
          source: the holdout split. pictures: how many of it, spread evenly.
          batch_size: over all processes; each holds its own equal part.
          times: quantiles of the training density of t, the middles of as many equal parts.
        """
        records = [record for _, record in source.iter_valid(spread(len(source), pictures))]
        count = len(records) * times
        # Rows of the last batch beyond the list repeat its last entry with weight 0.
        rows = np.arange(count + -count % batch_size)
        entry = rows.clip(max=count - 1)
        quantile = (np.arange(times, dtype=np.float32) + 0.5) / times
        t = np.asarray(flow.time_at_quantile(flow_config, jnp.asarray(quantile)))
        self._mesh = mesh
        self._pictures = collate(records, [0] * len(records), layout.without_patches())  # each once
        local, process = batch_size // jax.process_count(), jax.process_index()
        self._rows = [
            (
                entry[own] // times,
                {
                    "index": (_FIRST_INDEX + rows[own]).astype(self._pictures["index"].dtype),
                    "t": t[entry[own] % times],
                    "weight": (rows[own] < count).astype(np.float32),
                },
            )
            for start in range(process * local, len(rows), batch_size)
            for own in [slice(start, start + local)]
        ]

        self.pictures = len(records)
        self._count, self._times = count, times
        self._measure = functools.partial(_measure, config, statistics)

    def __call__(self, ema: Any) -> dict[str, float]:
        """`heldout_loss` and its split by time, of f32 EMA weights."""
        total, bins, counts = 0.0, np.zeros(flow.TIME_BINS), np.zeros(flow.TIME_BINS)
        for number in range(len(self._rows)):
            made = self._measured(ema, number)
            loss, bin_loss, bin_count = jax.device_get(made[:3])
            total, bins, counts = total + float(loss), bins + bin_loss, counts + bin_count
        scalars = {"heldout_loss": total / self._count}
        for i in np.flatnonzero(counts):
            scalars[f"heldout_loss_by_time/{i / flow.TIME_BINS:.3f}"] = float(bins[i] / counts[i])
        return scalars

    def of_pictures(self, ema: Any) -> np.ndarray:
        """The loss of each picture, mean over its times: float64 [pictures]. For one process."""
        rows = [self._measured(ema, number)[3] for number in range(len(self._rows))]
        losses = np.concatenate([np.asarray(part, np.float64) for part in rows])
        return losses[: self.pictures * self._times].reshape(self.pictures, self._times).mean(1)

    def _measured(self, ema: Any, number: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """`_measure` of a batch."""
        pictures, drawn = self._rows[number]
        batch = {name: array[pictures] for name, array in self._pictures.items()} | drawn
        with jax.set_mesh(self._mesh):  # which `attention` reads
            return self._measure(ema, sharding.put_batch(self._mesh, batch))
