"""Rectified flow: the path from image to noise, its velocity, the time density, condition dropout, and means of losses.

x_t = (1 - t) x_0 + t noise, target velocity v = noise - x_0, t = 1 is noise (arXiv:2209.03003, 2403.03206).
Everything here is f32: time in bf16 has 8 bits, which merges neighbouring noise levels near t = 1.

Time, noise and dropped conditions of a sample are functions of (seed, index), and stratified times also of the global
batch size. The index counts the samples drawn since the start of the run; the key is fold_in(fold_in(key(seed), index),
purpose). So the draws of a step are the same however the global batch is split into micro-batches or over devices, and
no random state needs saving.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

# One purpose, one stream: sharing a key would tie the noise to the time and to the dropped conditions.
_TIME, _NOISE, _DROP, _STRATA, _ORDER = range(5)
Drop = tuple[tuple[str, ...], float]
DROP = "all 0.1, text 0.1, vision 0.3"  # the default of `parse_drop`
FURTHER_DROP = 0.3  # of a condition that is in no subset but "all"
TIME_BINS = 8  # the loss is also reported by equal bins of t


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The time density and the condition dropout.

    Attributes:
      mean, std: of the normal whose sigmoid is t (logit-normal, arXiv:2403.03206 section 3.1).
      uniform_share: share of samples whose t is uniform instead; 1.0 is plain uniform time.
      shift: s of t' = s t / (1 + (s - 1) t), applied last; sampling uses the same s.
      stratified: draw the times of one global batch from as many equal quantiles, for a quieter loss.
      drop: (conditions dropped together, probability) of each outcome of the one categorical draw a sample gets; with
        the rest of the probability it keeps all of them. See `parse_drop`.
    """

    mean: float = 0.0
    std: float = 1.0
    uniform_share: float = 0.0
    shift: float = 1.0
    stratified: bool = True
    drop: tuple[Drop, ...] = ((("text", "vision"), 0.1), (("text",), 0.1), (("vision",), 0.3))

    def dropped(self, names: Iterable[str]) -> float:
        """Probability that exactly these conditions are dropped."""
        wanted = set(names)
        return sum(share for subset, share in self.drop if set(subset) == wanted)


def shift_time(t: jax.Array, shift: float) -> jax.Array:
    """The token-count shift t' = s t / (1 + (s - 1) t): monotone, fixes 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


def shift_for_tokens(tokens: int, base_tokens: int = 256) -> float:
    """s = sqrt(tokens / base_tokens): keeps the image-level noise (arXiv:2403.03206, 5.3.2).

    At least 1: below `base_tokens` it would move the times towards little noise, where the composition is decided
    already (benchmarks/results/convergence.md, auto_shift).
    """
    return max(1.0, (tokens / base_tokens) ** 0.5)


def sample_keys(seed: int, index_B: jax.Array) -> jax.Array:
    """One key per sample, from the run's seed and the sample's position in the run (uint32 [B])."""
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(index_B)


def draw_time(config: FlowConfig, seed: int, index_B: jax.Array, global_batch_size: int) -> jax.Array:
    """Times in (0, 1), f32 [B], after the shift."""
    keys = sample_keys(seed, index_B)
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _TIME)))(keys)
    if config.stratified:
        step_B, slot_B = index_B // global_batch_size, index_B % global_batch_size

        def stratum(step: jax.Array, slot: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), _STRATA)
            return jax.random.permutation(key, global_batch_size)[slot]

        u = (jax.vmap(stratum)(step_B, slot_B) + u) / global_batch_size
    return time_at_quantile(config, u)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all that draw times: the quantile function is long
def time_at_quantile(config: FlowConfig, u: jax.Array) -> jax.Array:
    """The inverse distribution function of the time density, shift included: u in (0, 1) to t in (0, 1), f32.

    The first `uniform_share` of the quantiles is the uniform part, so that strata of u stay strata of t.
    """
    share = config.uniform_share
    edge = 1e-6
    uniform = u / max(share, edge)
    normal_quantile = jax.scipy.special.ndtri(jnp.clip((u - share) / max(1 - share, edge), edge, 1 - edge))
    logit_normal = jax.nn.sigmoid(config.mean + config.std * normal_quantile)
    t = jnp.where(u < share, uniform, logit_normal)
    return shift_time(jnp.clip(t, edge, 1 - edge), config.shift)


def draw_noise(seed: int, index_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise, f32 [B, *shape]."""
    keys = sample_keys(seed, index_B)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, _NOISE), shape))(keys)


def parse_drop(text: str, names: Sequence[str], of_captions: Sequence[str] = ()) -> tuple[Drop, ...]:
    """The condition dropout of `FlowConfig`, from text.

    Args:
      text: subsets with their probabilities, as "all 0.1, text 0.1, vision+pose 0.2": `all` is every condition.
        A condition other than text and vision that no subset but `all` names is dropped independently, with
        probability `FURTHER_DROP`, in every outcome but `all`; NAME 0 turns this off.
      names: the conditions of the network.
      of_captions: those that are made from the caption: one that the text does not name is dropped with "text".

    Raises:
      ValueError: it is malformed, a name is not there, or the probabilities do not fit.
    """
    outcomes: list[Drop] = []
    named = {"text", "vision"}
    with_text = tuple(name for name in of_captions if name != "text" and name not in re.split(r"[ ,+]+", text))
    for part in filter(None, map(str.strip, text.split(","))):
        words, _, number = part.rpartition(" ")
        subset = tuple(map(str.strip, words.split("+")))
        if subset == ("all",):
            subset = tuple(names)
        else:
            subset += with_text if "text" in subset else ()
            named.update(subset)
        if unknown := [name for name in subset if name not in names]:
            raise ValueError(f"{part!r} names {unknown[0]!r}; the conditions are {', '.join(names)}")
        try:
            share = float(number)
        except ValueError:
            raise ValueError(f"{part!r} is not NAMES PROBABILITY") from None
        if not 0 <= share <= 1:
            raise ValueError(f"{part!r}: the probability must be between 0 and 1")
        outcomes.append((subset, share))
    rest = 1 - sum(share for _, share in outcomes)
    if rest < -1e-9:
        raise ValueError(f"the probabilities add up to {1 - rest:g}, more than 1")
    if unnamed := [name for name in names if name not in named and name not in with_text]:
        outcomes.append(((), rest))
    for name in unnamed:
        outcomes = [each for outcome in outcomes for each in _divided(outcome, name)]
    return tuple((subset, share) for subset, share in outcomes if subset)


def _divided(outcome: Drop, name: str) -> list[Drop]:
    """The outcome without and with one more condition dropped; as it is if that is dropped already."""
    subset, share = outcome
    if name in subset:
        return [outcome]
    return [(subset, (1 - FURTHER_DROP) * share), ((*subset, name), FURTHER_DROP * share)]


def draw_kept_conditions(
    config: FlowConfig, names: Iterable[str], seed: int, index_B: jax.Array
) -> dict[str, jax.Array]:
    """Whether each sample keeps each condition, bool [B] by name: one categorical draw over the subsets."""
    keys = sample_keys(seed, index_B)
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _DROP)))(keys)
    keep = {name: jnp.ones(u.shape, bool) for name in names}
    low = 0.0
    for subset, share in config.drop:
        drop = (u >= low) & (u < low + share)
        low += share
        for name in subset:
            keep[name] &= ~drop
    return keep


def draw_order(seed: int, index_B: jax.Array, valid_BxN: jax.Array) -> jax.Array:
    """A random order of each sample's own tokens, then the padding: int32 [B, N], where each token is taken from."""
    N = valid_BxN.shape[1]
    keys = sample_keys(seed, index_B)
    u_BxN = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _ORDER), (N,)))(keys)
    return jnp.argsort(jnp.where(valid_BxN, u_BxN, 1.0), axis=1, stable=True).astype(jnp.int32)


def interpolate(x0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """x_t = (1 - t) x_0 + t noise for [B, ...] arrays."""
    t = t_B.reshape(-1, *([1] * (x0.ndim - 1)))
    return (1 - t) * x0 + t * noise


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The target v = dx_t / dt = noise - x_0."""
    return noise - x0


def sample_means(values_BxNxP: jax.Array, valid_BxN: jax.Array) -> jax.Array:
    """Mean over each sample's own tokens and their channels, f32 [B]."""
    tokens = jnp.sum(valid_BxN, axis=1)
    total = jnp.sum(jnp.where(valid_BxN[..., None], values_BxNxP, 0.0), axis=(1, 2))
    return total / (tokens * values_BxNxP.shape[-1])


def loss_by_time(loss_B: jax.Array, t_B: jax.Array, weight_B: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, number of samples) in each of `TIME_BINS` equal bins of t, f32 each.

    Args:
      weight_B: counts a sample as so many; its loss is taken as already multiplied. None: one each.
    """
    member = jax.nn.one_hot(jnp.clip((t_B * TIME_BINS).astype(jnp.int32), 0, TIME_BINS - 1), TIME_BINS)
    weight_B = jnp.ones_like(loss_B) if weight_B is None else weight_B
    return loss_B @ member, weight_B @ member
