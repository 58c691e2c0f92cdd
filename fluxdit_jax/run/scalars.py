"""What a run measures: where each scalar stands in TensorBoard, and what it says.

`metrics.jsonl` has the plain names. TensorBoard sorts its sections by name, so theirs begin with a number: it opens on
what matters most.
"""

from __future__ import annotations

LEARNING, STABILITY, SPEED, BY_TIME, BY_PART = (
    "1_learning",
    "2_stability",
    "3_speed",
    "4_loss_by_noise_level",
    "5_gradient_norm_by_part",
)

# name: (section of TensorBoard, meaning, in Markdown)
SCALARS = {
    "heldout_loss": (
        LEARNING,
        "Loss of the EMA on the held-out images, at fixed noise and times. Healthy: falls, ever more slowly. "
        "Rises while `loss` falls: the model memorises its images; stop, or find more images.",
    ),
    "loss": (
        LEARNING,
        "Training loss: mean squared error of the predicted velocity over the tokens of a sample, then over samples. "
        "Healthy: falls steeply for some hundred steps, then very slowly and noisily.",
    ),
    "velocity_rms_ratio": (
        LEARNING,
        "RMS of the predicted over that of the target velocity. Healthy: from 0 towards 1, mostly 0.8 to 1. "
        "Below 0.3 after the warm-up: it predicts the mean of everything, which is grey. Above 1.5: it has diverged.",
    ),
    "alignment_loss": (
        LEARNING,
        "1 - cosine of the projected features with the vision encoder's patches (`alignment.block`). Healthy: falls "
        "from 1, fast at first.",
    ),
    "alignment_cosine": (
        LEARNING,
        "Cosine of the alignment's gradient with the flow's, of the features at the tap. Above 0 it helps the flow; "
        "once it stays at 0 or below, end the alignment (`alignment.until`).",
    ),
    "ema_distance": (
        LEARNING,
        "Distance of the weights from their EMA. Healthy: falls with the learning rate, constant at a constant one.",
    ),
    "gradient_norm": (
        STABILITY,
        "Global norm of the gradient before clipping. Healthy: noisy, slowly falling. A jump that stays: the learning "
        "rate is too high. Sinks to 0: nothing is learned any more.",
    ),
    "update_norm": (STABILITY, "Global norm of the step's change of the weights. Follows the learning rate."),
    "parameter_norm": (STABILITY, "Global norm of the weights. Healthy: grows slowly, then levels off."),
    "learning_rate": (STABILITY, "Learning rate of the step."),
    "skipped": (
        STABILITY,
        "Micro-batches skipped since the last point, because their gradient was not finite. Healthy: 0.",
    ),
    "replaced_samples": (
        STABILITY,
        "Samples since the last point whose damaged record another one replaced (`data.on_corrupt`). Healthy: 0.",
    ),
    "images_per_second": (SPEED, "Training images per second, without the time for pictures and saving."),
    "tokens_per_second": (SPEED, "Image tokens per second, padding not counted."),
    "mfu": (
        SPEED,
        "Model FLOPs utilisation: FLOPs of the network, recomputation not counted, over the peak.",
    ),
    "data_wait": (
        SPEED,
        "Share of the time spent waiting for data. Healthy: below 0.05. Above 0.25: raise `data.threads`.",
    ),
    "stage": (SPEED, "Number of the stage of the run, from 1."),
    "resolution": (SPEED, "Side of the square with the pixel budget of the stage, pixels."),
    "device_memory_gb": (SPEED, "Largest memory in use on the first device so far, GB."),
}
_FAMILIES = {
    "heldout_loss/": (
        f"{LEARNING}/heldout_loss_",
        "Held-out loss of the EMA at the resolution and the times of this stage, also before and after it.",
    ),
    "loss_by_time/": (
        f"{BY_TIME}/train_",
        "Training loss of the samples whose time t lies in the eighth that begins here; t = 1 is pure noise. "
        "Small t is fine detail, large t is composition.",
    ),
    "heldout_loss_by_time/": (
        f"{BY_TIME}/heldout_",
        "Held-out loss of the EMA in the eighth of the times that begins here; t = 1 is pure noise.",
    ),
    "gradient_norm_by_group/": (
        f"{BY_PART}/",
        "Gradient norm of a part of the network. Exactly 0 for long: that part is not connected.",
    ),
}
_SHORT_EMA = "short_ema/"

# TensorBoard's "custom scalars" page: what to look at first, side by side.
LAYOUT = {
    "is it learning": {
        "loss": [f"^{LEARNING}/loss$", f"^{LEARNING}/heldout_loss$", f"^{LEARNING}/short_ema_heldout_loss$"],
        "loss by noise level": [f"^{BY_TIME}/train_.*"],
        "predicted over target velocity (healthy: near 1)": [f"^{LEARNING}/velocity_rms_ratio$"],
    },
    "is it stable": {
        "gradient norm (healthy: noisy, slowly falling)": [f"^{STABILITY}/gradient_norm$"],
        "gradient norm by part": [f"^{BY_PART}/.*"],
        "update norm": [f"^{STABILITY}/update_norm$"],
    },
    "is it fast": {
        "images per second": [f"^{SPEED}/images_per_second$"],
        "share of time waiting for data": [f"^{SPEED}/data_wait$"],
        "model FLOPs utilisation": [f"^{SPEED}/mfu$"],
    },
}


def on_board(name: str) -> tuple[str, str]:
    """(tag in TensorBoard, description) of a scalar by its name in `metrics.jsonl`."""
    if name.startswith(_SHORT_EMA):
        section, _, rest = on_board(name.removeprefix(_SHORT_EMA))[0].partition("/")
        meaning = on_board(name.removeprefix(_SHORT_EMA))[1]
        return f"{section}/short_ema_{rest}", f"Of the second average (`ema.short_decay`). {meaning}"
    if name in SCALARS:
        section, meaning = SCALARS[name]
        return f"{section}/{name}", meaning
    for prefix, (start, meaning) in _FAMILIES.items():
        if name.startswith(prefix):
            return start + name.removeprefix(prefix), meaning
    return name, ""
