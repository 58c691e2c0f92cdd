"""Production in a single stage: the 526 M DiT of configs/prod.py at 1024 px from its first step to its last.

    python -m fluxdit_jax.train --config=configs/prod_1024.py --config.data.path=DATASET --config.workdir=runs/prod \
        --config.gate.report=runs/gate/validation/report.json

The 200,000 steps are 121 days on a 4090 at half of its peak; configs/prod.py comes to 1024 px within a week. It does
not start without a passing report of the gate (configs/nano.py, fluxdit_jax.validate) on data of the
same encoders; --config.gate.required=False starts it all the same.

Width 1152, depth 24, 18 heads of 64, patch 2: 4,096 tokens at 1024 px. bfloat16 network, f32 masters,
moments, accumulator and EMA: 10.5 GB of state, and 5.8 GB of temporaries for a micro-batch of 4 that keeps the results
of attention (4.2 with block remat, which computes them again: 9 % more FLOPs). Effective batch 256 = 64 micro-batches.
A step is 256 x 21 TFLOP = 5.5 PFLOP (forward, backward, recomputation): about a minute at half of an RTX
4090's 165 TFLOP/s, so resumable checkpoints are written by time. The memory is XLA's own plan of this step, compiled
for a 4090 without one (benchmarks/results/gpu_plan.md); it has not yet been run on one.
On an H200 held to 24 GB a micro-batch takes 0.21 s (19 images/s, MFU 32 %, 16.9 GB; 2026-11-28): 13.5 s a step.
"""

from ml_collections import ConfigDict

from fluxdit_jax.configs import prod


def get_config() -> ConfigDict:
    c = prod.get_config()
    c.train.stages, c.stages = "", ConfigDict()
    c.data.micro_batch_size = 4
    c.optim.warmup_steps = 1000
    c.train.steps = 200_000  # no planned end
    return c
