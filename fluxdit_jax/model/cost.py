"""FLOPs of the network, by hand."""

from __future__ import annotations

from fluxdit_jax.model import dit
from fluxdit_jax.model.routing import Routing


def flops_per_sample(
    config: dit.ModelConfig,
    tokens: int,
    lengths: dict[str, int],
    routing: Routing | None = None,
    projecting: bool = False,
) -> int:
    """Forward matrix-product FLOPs of one sample (2 per multiply-add), counted by hand.

    XLA's own cost analysis counts the body of a scan once. Training costs three times this, recomputation
    not included, as model FLOPs utilisation is defined (arXiv:2204.02311, appendix B).

    Args:
      tokens: of the image. lengths: of each sequence. routing: of a training step; None: of a dense one.
      projecting: with the projector.
    """
    D, N, T = config.width, tokens, sum(lengths[c.name] for c in config.sequences)

    def block(N: int) -> int:
        flops = 2 * N * D * (3 * D + D)  # self-attention projections
        flops += 4 * N * N * D  # logits and weighted sum
        flops += 2 * N * D * 2 * D + 2 * T * D * 2 * D + 4 * N * T * D  # cross-attention
        return flops + 2 * N * D * 3 * config.mlp_hidden

    a, b = (0, 0) if routing is None else routing.middle(config.depth)
    blocks = (config.depth - (b - a)) * block(N) + ((b - a) * block(routing.length(N)) if routing else 0)
    ends = 2 * N * 2 * config.token_width * D + sum(2 * lengths[c.name] * c.width * D for c in config.sequences)
    vectors = sum(c.width for c in config.vectors)
    vector = 2 * D * (dit.TIME_FEATURES + D + vectors + (dit.N_BLOCK_MODULATIONS + 2) * D)
    hidden = dit.PROJECTOR_HIDDEN * D
    projector = D * hidden + hidden * hidden + hidden * config.target_width
    return blocks + ends + vector + (2 * dit.tap_shape(config, 1, N, routing)[1] * projector if projecting else 0)
