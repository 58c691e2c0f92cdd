"""A node of ComfyUI that draws from a folder of `python -m fluxdit_jax.export --format diffusers`.

Copy or link this folder into ComfyUI/custom_nodes. It needs nothing of fluxdit_jax or JAX, but torch and diffusers, and
transformers for T5 and DINO. Models are looked for in ComfyUI/models/diffusers and by path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

try:  # within ComfyUI
    import folder_paths

    import comfy.model_management as management
    from comfy.utils import ProgressBar
except ImportError:
    management = folder_paths = ProgressBar = None

INDEX = "model_index.json"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def models() -> list[str]:
    """Names of the exported folders in ComfyUI's models/diffusers."""
    if folder_paths is None:
        return []
    found = []
    for root in folder_paths.get_folder_paths("diffusers"):
        found += sorted(path.parent.name for path in Path(root).glob(f"*/{INDEX}") if is_ours(path))
    return found


def is_ours(index: Path) -> bool:
    """Whether a model_index.json is of an export, and not of another pipeline."""
    return "FluxDiTPipeline" in index.read_text(encoding="utf-8", errors="replace")


def folder_of(model: str) -> Path:
    """The folder of a name of `models`, or a path.

    Raises:
      ValueError: there is no exported model.
    """
    roots = folder_paths.get_folder_paths("diffusers") if folder_paths is not None else []
    for place in [Path(root) / model for root in roots] + [Path(model).expanduser()]:
        if model and (place / INDEX).is_file() and is_ours(place / INDEX):
            return place.resolve()
    raise ValueError(
        f"model {model!r}: no folder with {INDEX} of that name or path. Make one with `python -m fluxdit_jax.export "
        "--format diffusers --workdir RUN --out DIR --license ID`, and put it into ComfyUI/models/diffusers"
    )


class FluxDiTLoader:
    """Loads an exported folder."""

    CATEGORY = "fluxdit"
    FUNCTION = "load"
    RETURN_TYPES = ("FLUXDIT",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        found = models()
        name = (found,) if found else ("STRING", {"default": "", "tooltip": "path of the exported folder"})
        trust = {"default": False, "tooltip": "loading runs the folder's own Python code: read it first"}
        return {
            "required": {
                "model": name,
                "dtype": (list(DTYPES), {"default": "auto"}),
                "trust_its_code": ("BOOLEAN", trust),
            },
            "optional": {"path": ("STRING", {"default": "", "tooltip": "of a folder elsewhere, instead of model"})},
        }

    def load(self, model: str, dtype: str, trust_its_code: bool, path: str = "") -> tuple[Any]:
        folder = folder_of(path or model)
        if not trust_its_code:
            raise ValueError(
                f"{folder} holds the code of its own network and pipeline, which loading it runs. Read pipeline.py, "
                "transformer/modeling_fluxdit.py and scheduler/scheduling_fluxdit.py, then set trust_its_code"
            )
        device = management.get_torch_device() if management is not None else torch.device("cpu")
        chosen = DTYPES[dtype] or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        if management is not None:
            management.unload_all_models()  # ComfyUI does not know what this pipeline takes
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        # The encoders stay in the dtype that the dataset was made with. diffusers' own `to` warns of layers that are to
        # stay f32, of which there are none.
        torch.nn.Module.to(pipe.transformer, chosen)
        pipe.set_progress_bar_config(disable=True)
        return (pipe.to(device),)


class FluxDiTSampler:
    """Draws pictures of a prompt, and of a reference's light and mood."""

    CATEGORY = "fluxdit"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        def scale(default: float, most: float) -> tuple[str, dict[str, Any]]:
            return "FLOAT", {"default": default, "min": 0.0, "max": most, "step": 0.1, "display": "slider"}

        side = {"default": 0, "min": 0, "max": 4096, "step": 8, "tooltip": "0: the most common size of the training"}
        return {
            "required": {
                "model": ("FLUXDIT",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "guidance_text": scale(4.0, 15.0),
                "guidance_vision": scale(1.0, 8.0),
                "rescale": scale(0.0, 1.0),
                "steps": ("INT", {"default": 24, "min": 1, "max": 200}),
                "method": (["heun", "euler", "rk3"],),
                "width": ("INT", side),
                "height": ("INT", side),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1, "control_after_generate": True}),
                "count": ("INT", {"default": 1, "min": 1, "max": 64}),
            },
            "optional": {"reference": ("IMAGE",)},
        }

    def draw(
        self,
        model: Any,
        prompt: str,
        guidance_text: float,
        guidance_vision: float,
        rescale: float,
        steps: int,
        method: str,
        width: int,
        height: int,
        seed: int,
        count: int,
        reference: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """IMAGE f32 [B, H, W, 3] in 0 to 1; of several references the first is taken."""
        picture = None
        if reference is not None:
            picture = Image.fromarray((reference[0, ..., :3].cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8))
        bar = ProgressBar(steps) if ProgressBar is not None else None

        def after(pipe: Any, number: int, time: float, values: dict[str, Any]) -> None:
            if management is not None:
                management.throw_exception_if_processing_interrupted()
            if bar is not None:
                bar.update(1)

        images = model(
            prompt,
            reference=picture,
            guidance_text=guidance_text,
            guidance_vision=guidance_vision,
            rescale=rescale,
            num_inference_steps=steps,
            method=method,
            width=width or None,
            height=height or None,
            seed=seed,
            num_images_per_prompt=count,
            output_type="np",
            callback_on_step_end=after,
        ).images
        return (torch.from_numpy(np.ascontiguousarray(images)),)


NODE_CLASS_MAPPINGS = {"FluxDiTLoader": FluxDiTLoader, "FluxDiTSampler": FluxDiTSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"FluxDiTLoader": "Load FluxDiT", "FluxDiTSampler": "FluxDiT text to image"}
