"""A toy of production's stages: the demonstration set at 64 and then at 128 px, in minutes on two CPU cores.

    python -m preprocess demo --output data/demo-images
    python -m preprocess build --input data/demo-images --output data/demo-stages --resolution 64,128 --modulus 32 \
        --holdout 0.1 --vae builtin:dct --text-encoder builtin:hash --vision-encoder builtin:tone
    python -m fluxdit_jax.train --config=configs/demo_stages.py --config.data.path=data/demo-stages \
        --config.workdir=runs/demo-stages

16 and 64 tokens; the network is that of configs/demo.py.
"""

from ml_collections import ConfigDict

from fluxdit_jax.configs import demo
from fluxdit_jax.stages import add_stage


def get_config() -> ConfigDict:
    c = demo.get_config()
    add_stage(c, "px64", {"data.resolution": 64, "train.steps": 600, "optim.schedule": "constant"})
    add_stage(c, "px128", {"data.resolution": 128, "train.steps": 600, "optim.warmup_steps": 20})
    return c
