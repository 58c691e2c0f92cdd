"""A page to draw from this model in the browser, for a Space of the Hub: `python app.py`; needs gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = DiffusionPipeline.from_pretrained(Path(__file__).parent, trust_remote_code=True).to(device)
pipe.transformer.to(dtype)
sizes = [f"{width}x{height}" for width, height in pipe.sizes]


def draw(
    prompt: str, reference: Any, guidance_text: float, guidance_vision: float, steps: int, size: str, seed: int
) -> Any:
    width, height = (int(side) for side in size.split("x"))
    return pipe(
        prompt or "",
        reference=reference,
        guidance_text=guidance_text,
        guidance_vision=guidance_vision,
        num_inference_steps=int(steps),
        width=width,
        height=height,
        seed=int(seed),
    ).images[0]


gr.Interface(
    draw,
    [
        gr.Textbox(label="Prompt"),
        gr.Image(label="Reference for light and mood", type="pil"),
        gr.Slider(1, 10, 4, label="Guidance: prompt"),
        gr.Slider(1, 5, 1, label="Guidance: reference"),
        gr.Slider(4, 64, 24, step=1, label="Steps"),
        gr.Dropdown(sizes, value=sizes[0], label="Size"),
        gr.Number(0, label="Seed", precision=0),
    ],
    gr.Image(label="Picture", format="png"),
    flagging_mode="never",
).launch()
