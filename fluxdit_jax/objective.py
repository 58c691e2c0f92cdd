"""The loss of a micro-batch: the flow's, and that of the alignment."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxdit_jax import alignment, flow
from fluxdit_jax.alignment import AlignmentConfig
from fluxdit_jax.model import dit
from fluxdit_jax.model.conditions import Given, given
from fluxdit_jax.model.routing import Routed, Routing, reordered

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


def patch_statistics(mean: tuple[float, ...], std: tuple[float, ...], patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel latent statistics laid out as a patch, f32 [P]. Patches are (row, column, channel)."""
    return np.tile(np.array(mean, np.float32), patch**2), np.tile(np.array(std, np.float32), patch**2)


def valid_tokens(grid_Bx2: jax.Array, tokens: int) -> jax.Array:
    """bool [B, tokens]: which tokens are the sample's own."""
    return jnp.arange(tokens)[None, :] < (grid_Bx2[:, 0] * grid_Bx2[:, 1])[:, None]


def normalize_latents(batch: Batch, mean_P: np.ndarray, std_P: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(normalised latent tokens f32 [B, N, P] with zeros at padding, validity bool [B, N])."""
    tokens = batch["latent"].astype(jnp.float32)
    valid = valid_tokens(batch["grid"], tokens.shape[1])
    return jnp.where(valid[..., None], (tokens - mean_P) / std_P, 0.0), valid


def flow_loss(
    graph: Any,
    params: Any,
    grid: jax.Array,
    conditions: dict[str, Given],
    x0: jax.Array,
    valid: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    routed: Routed | None = None,
    probes: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Runs the network on (x_t, t) and returns f32 (loss [B], prediction [B, N, P], target [B, N, P], projection).

    With `routed` the tokens of prediction and target are in its order. The projection is None without `probes`, see
    `dit.DiT.__call__`.
    """
    noise = jnp.where(valid[..., None], noise, 0.0)
    if routed is not None:
        x0, noise = reordered(x0, routed.order_BxN), reordered(noise, routed.order_BxN)
    options = {name: value for name, value in (("routed", routed), ("probes", probes)) if value is not None}
    out = dit.apply(graph, params, flow.interpolate(x0, noise, t), t, grid, conditions, **options)
    prediction, projection = (out, None) if probes is None else out
    target = flow.velocity(x0, noise)
    return flow.sample_means(jnp.square(prediction - target), valid), prediction, target, projection


def alignment_loss(model: dit.ModelConfig, batch: Batch, projection: jax.Array, routed: Routed | None) -> jax.Array:
    """f32 [B] of the tokens that are there at the tap."""
    K, grid = projection.shape[1], batch["grid"]
    inside = routed is not None and dit.tap_inside(model, routed.routing)
    length_B = routed.kept_B if routed is not None and inside else grid[:, 0] * grid[:, 1]
    order = jnp.arange(K, dtype=jnp.int32)[None, :] if routed is None else routed.order_BxN[:, :K]
    return alignment.loss(projection, alignment.targets(batch["patches"], batch["cells"], grid, order), length_B)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """What is minimised: the mean over the samples of a micro-batch, of weights and batch alone.

    Attributes:
      statistics: `patch_statistics` of the dataset.
      seed, global_batch_size: of what is drawn for each sample by its index.
      routing: of the tokens; None: each goes through every block.
      aligned: the alignment, with `model.tap`; None: none.
    """

    graph: Any
    model: dit.ModelConfig
    flow: flow.FlowConfig
    statistics: tuple[np.ndarray, np.ndarray]
    _: dataclasses.KW_ONLY
    seed: int
    global_batch_size: int
    routing: Routing | None = None
    aligned: AlignmentConfig | None = None

    def probes(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Zeros, by which the gradients of both losses of the aligned features are taken; see `dit.DiT.__call__`."""
        B, N = batch["latent"].shape[:2]
        zeros = jnp.zeros(dit.tap_shape(self.model, B, N, self.routing), self.model.dtype)
        return zeros, zeros

    def __call__(
        self, params: Any, probes: tuple[jax.Array, jax.Array] | None, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        """The loss, f32, and metrics on the device; without `probes` that of the flow alone.

        Args:
          params: weights in the model's dtype.
          batch: `BatchLayout.shapes`.
        """
        index, grid = batch["index"], batch["grid"]
        x0, valid = normalize_latents(batch, *self.statistics)
        t = flow.draw_time(self.flow, self.seed, index, self.global_batch_size)
        noise = flow.draw_noise(self.seed, index, x0.shape[1:])
        names = [condition.name for condition in self.model.conditions]
        conditions = given(self.model.conditions, batch, flow.draw_kept_conditions(self.flow, names, self.seed, index))
        routed = self._routed(index, grid, valid)
        loss_B, prediction, target, projection = flow_loss(
            self.graph, params, grid, conditions, x0, valid, t, noise, routed, probes
        )
        bin_loss, bin_count = flow.loss_by_time(loss_B, t)
        metrics: Metrics = {
            "loss": jnp.mean(loss_B),
            "prediction_rms": jnp.sqrt(jnp.mean(flow.sample_means(jnp.square(prediction), valid))),
            "target_rms": jnp.sqrt(jnp.mean(flow.sample_means(jnp.square(target), valid))),
            "tokens": jnp.sum(valid),
            "replaced": jnp.sum(batch["replaced"]),
            "bin_loss": bin_loss,
            "bin_count": bin_count,
        }
        if projection is None or self.aligned is None:
            return metrics["loss"], metrics
        metrics["alignment"] = {"loss": jnp.mean(alignment_loss(self.model, batch, projection, routed))}
        return metrics["loss"] + self.aligned.weight * metrics["alignment"]["loss"], metrics

    def _routed(self, index: jax.Array, grid: jax.Array, valid: jax.Array) -> Routed | None:
        if self.routing is None:
            return None
        order = flow.draw_order(self.seed, index, valid)
        return Routed(order, self.routing.kept(grid[:, 0] * grid[:, 1]), self.routing)
