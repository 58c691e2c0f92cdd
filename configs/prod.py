"""Production (part C): a 526 M DiT on one 24 GB card, a week in three stages: 256, 512 and 1024 px.

    python -m preprocess build --input IMAGES --output DATASET --resolution 256,512,1024
    python -m fluxdit_jax.train --config=configs/prod.py --config.data.path=DATASET --plan
    python -m fluxdit_jax.train --config=configs/prod.py --config.data.path=DATASET --config.workdir=runs/prod \
        --config.gate.report=runs/gate/validation/report.json

It does not start without a passing report of the gate (configs/nano.py, fluxdit_jax.validate) on data of the
same encoders; --config.gate.required=False starts it all the same.

Width 1152, depth 24, 18 heads of 64, patch 2. bfloat16 network, f32 masters, moments, accumulator and EMA: 10.5 GB of
state, and 6 GB of temporaries in each stage, with attention's results kept (XLA's own plan of each stage's step,
compiled for an RTX 4090: benchmarks/results/gpu_plan.md). Where a picture costs a 22nd, at 256 px, it sees most of its
pictures. By arithmetic, at half of a 4090's 165 TFLOP/s, over 100,000 images:

    px     steps    pictures   epochs   s a step   days
    256    60,000   15.4 M     154      2.4        1.6
    512    24,000    6.1 M      61      9.8        2.7
    1024    3,500    0.9 M       9     52          2.1

6.5 days. It has not yet been run on that card; an H200 held to 24 GB reached 29 to 32 % of its own peak.
"""

from ml_collections import ConfigDict

from fluxdit_jax.config import default_config
from fluxdit_jax.stages import add_stage


def get_config() -> ConfigDict:
    c = default_config()
    c.model.width = 1152
    c.model.depth = 24
    c.model.heads = 18
    c.model.remat = "attention"
    c.data.threads = 4
    c.data.prefetch = 8
    c.optim.global_batch_size = 256
    c.optim.lr = 1e-4
    c.optim.schedule = "constant"  # the EMA does the annealing
    # Micro-batches: the largest that leave room on 24 GB. Warm-ups: the moments carry over, but the gradients after a
    # switch are of another kind; a tenth of the shortest stage is enough.
    add_stage(
        c,
        "px256",
        {"data.resolution": 256, "train.steps": 60_000, "data.micro_batch_size": 64, "optim.warmup_steps": 1000},
    )
    add_stage(
        c,
        "px512",
        {"data.resolution": 512, "train.steps": 24_000, "data.micro_batch_size": 16, "optim.warmup_steps": 500},
    )
    add_stage(
        c,
        "px1024",
        {"data.resolution": 1024, "train.steps": 3500, "data.micro_batch_size": 4, "optim.warmup_steps": 350},
    )
    c.checkpoint.minutes = 30.0
    c.checkpoint.ema_every = 5000
    c.plan.utilisation = 0.5
    c.health.action = "warn"
    c.gate.required = True
    c.log.every = 10
    c.log.preview_every = 500
    return c
