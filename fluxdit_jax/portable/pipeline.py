"""Text to image with a diffusion transformer of fluxdit_jax, as a pipeline of diffusers.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    pipe("a lighthouse at dusk", seed=0, guidance_text=4).images[0].save("lighthouse.png")

It draws what `python -m fluxdit_jax.sample` draws. The encoders and the VAE are those of the training set. One that is
not bundled is fetched under its name when it is first needed; the built-in ones need no files.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from PIL import Image

from .builtin import DctVae, HashText, ToneVision
from .encoders import Size, decode, digest, encode_picture, encode_texts, fitted, patterns
from .noise import normal

COMPONENTS = {"vae": "vae", "text": "text_encoder", "vision": "vision_encoder"}  # by encoder
logger = logging.get_logger("diffusers.fluxdit")  # below diffusers', for its handler and level
_T5 = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


class FluxDiTPipeline(DiffusionPipeline):
    """See the module.

    Args:
      transformer: `FluxDiT`. scheduler: `RectifiedFlowSolver`.
      vae, text_encoder with its tokenizer, vision_encoder: of the training set; None: built in, or fetched when needed.
      facts: what the model was trained with. encoders: vae, text and vision, with id, revision, dtype and options.
        latent_mean, latent_std: of the latent's channels. sizes: [width, height, pictures], the most common first. fit,
        resolution, vision_resolution: how a picture was shown to the vision encoder. text_tokens: of the longest
        prompt; None: as the text encoder has it.
    """

    # For saving it again. diffusers keeps the code of all local pipelines in one file and one module: read it now.
    source = Path(__file__).read_text(encoding="utf-8")
    model_cpu_offload_seq = "text_encoder->vision_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "vision_encoder"]  # noqa: RUF012  diffusers' name

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        vision_encoder: Any = None,
        facts: dict[str, Any] | None = None,
    ):
        super().__init__()
        if text_encoder is not None:  # T5's table is in two modules: to disk, diffusers empties it and stores it again
            text_encoder.set_input_embeddings(text_encoder.get_input_embeddings())
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vision_encoder=vision_encoder,
        )
        self.register_to_config(facts=facts)
        for name, part in COMPONENTS.items():  # before offloading, after which none is cast
            if getattr(self, part) is not None:
                torch.nn.Module.to(getattr(self, part), self._dtype_of(name))

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of the pictures that it was trained on, the most common first."""
        return [(width, height) for width, height, pictures in self.config.facts["sizes"] if pictures]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        reference: Image.Image | None = None,
        conditions: dict[str, np.ndarray] | None = None,
        guidance_text: float = 1.0,
        guidance_vision: float = 1.0,
        guidance: dict[str, float] | None = None,
        rescale: float = 0.0,
        num_inference_steps: int = 32,
        method: str = "heun",
        width: int | None = None,
        height: int | None = None,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> ImagePipelineOutput:
        """Draws pictures.

        Args:
          prompt: one or several; "" is a prompt as well.
          reference: a picture whose light and mood to take, through the vision encoder.
          conditions: others of the training set by name, f32: "vision" [V] instead of a reference, or a further one.
          guidance_text, guidance_vision: 1 draws what the model learned; 3 to 7 and 1 to 3 are usual. guidance: of
            further conditions. Each condition that is guided costs one more evaluation of the network.
          rescale: 0 to 1, takes back the saturation of strong guidance.
          num_inference_steps, method: of the solver: "euler", "heun" or "rk3" (1, 2 or 3 evaluations a step).
          width, height: one of `sizes`; default: the most common.
          seed: of the first picture, 0 to 2**31 - 1; the others count up.
          output_type: "pil", "np" (f32 [B, H, W, 3] in 0 to 1) or "latent" (f32 [B, C, h, w] as the dataset stores it).
          callback_on_step_end: called with the pipeline, the step's number, the time after it and
            {"latents": tokens [B, N, P]}.

        Raises:
          ValueError: an argument that cannot be drawn; the message names it.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        scales = {"text": guidance_text, "vision": guidance_vision} | (guidance or {})
        self._check(prompts, reference, list(scales.values()), rescale, seed, num_images_per_prompt, output_type)
        size = self._size(width, height)
        known = [name for name, *_ in self.transformer.config.conditions]
        if unknown := sorted(set(guidance or {}) - set(known)):
            raise ValueError(f"guidance has {unknown[0]!r}; this model's conditions are {', '.join(known)}")
        texts = [text for text in self.encode_prompts(prompts) for _ in range(num_images_per_prompt)]
        wanted = self._wanted(texts, reference, conditions or {})
        config, device, count = self.transformer.config, self._execution_device, len(texts)
        columns, rows = (side // (self._factor * config.patch) for side in size)
        shape = (rows * columns, config.channels * config.patch**2)
        start = torch.from_numpy(np.stack([normal(seed + row, shape) for row in range(count)])).to(device)

        # Guidance adds the conditions one by one, in the order in which the network has them.
        names = [name for name, *_ in config.conditions if name in wanted]
        guided = names if any(scale != 1 for scale in scales.values()) else []
        levels = [names[:number] for number in range(len(guided) + 1)] if guided else [names]
        given = [{key: value for name in level for key, value in wanted[name].items()} for level in levels]

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            # One level after the other: guidance costs time and no memory.
            found = [self.transformer(x, t.expand(count), (rows, columns), each) for each in given]
            if not guided:
                return found[0]
            return self.scheduler.guide(found, [scales.get(name, 1.0) for name in guided], rescale)

        times = self.scheduler.times(num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as bar:

            def after(number: int, x: torch.Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, number, float(times[number + 1]), {"latents": x})

            tokens = self.scheduler.solve(velocity, start, num_inference_steps, method, after)
        latents = self._unpatched(tokens, rows, columns)
        images = latents.cpu().numpy() if output_type == "latent" else self.decode(latents)
        self.maybe_free_model_hooks()
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        elif output_type == "np":
            images = images.astype(np.float32) / 255
        return ImagePipelineOutput(images=images)

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """As diffusers does it, with the code, which it leaves out. To the Hub: `hf upload` afterwards."""
        if options.get("push_to_hub"):
            raise ValueError(
                "push_to_hub uploads before the code is there: save, look at it, then `hf upload NAME DIR`"
            )
        super().save_pretrained(save_directory, *arguments, **options)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        index["_class_name"] = ["pipeline", type(self).__name__]
        (folder / "pipeline.py").write_text(type(self).source, encoding="utf-8")
        for name, module in (("transformer", "modeling_fluxdit"), ("scheduler", "scheduling_fluxdit")):
            part = getattr(self, name)
            kind = type(getattr(part, "_orig_mod", part))  # within torch.compile's
            (folder / name / f"{module}.py").write_text(kind.source, encoding="utf-8")
            index[name] = [module, kind.__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2))

    # ------------------------------------------------------------------------------------------------- encoders

    def encode_prompts(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """bfloat16 [n, E] of each prompt, cut where training cuts, which a warning tells."""
        trained = self.config.facts["encoders"]["text"]
        limit = trained["options"].get("max_tokens", 512)
        if trained["id"] == "builtin:hash":
            built_in = HashText(limit)
            texts = [torch.from_numpy(text).to(torch.bfloat16) for text in built_in.encode(list(prompts))]
            counts = built_in.count(list(prompts))
        else:
            if self.text_encoder is None or self.tokenizer is None:
                import transformers

                directory = self._fetched("text")
                name = _T5[transformers.AutoConfig.from_pretrained(directory).model_type]
                self.register_modules(
                    tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
                    text_encoder=self._loaded(getattr(transformers, name), directory),
                )
            texts = encode_texts(self._ready("text"), self.tokenizer, prompts, limit, self._execution_device)
            counts = [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]
        texts = [text[: self.config.facts["text_tokens"]] for text in texts]
        for prompt, text, count in zip(prompts, texts, counts, strict=True):
            if len(text) < count:
                logger.warning(
                    f"the prompt has {count} tokens, of which {len(text)} are kept, as in training: {prompt[:60]!r}"
                )
        return texts

    def encode_reference(self, picture: Image.Image) -> np.ndarray:
        """f32 [V]: what the vision encoder says of a picture as the training pictures were shown to it."""
        facts = self.config.facts
        trained, side = facts["encoders"]["vision"], facts["resolution"]
        seen = facts["vision_resolution"] or side
        shown = fitted(picture, [(w * seen // side, h * seen // side) for w, h, _ in facts["sizes"]], facts["fit"])
        if trained["id"] == "builtin:tone":
            return ToneVision().encode(shown[None])[0]
        if trained["options"].get("side") is None:
            raise ValueError(
                f"the dataset's vision vectors came from files ({trained['id']}): give conditions={{'vision': vector}}"
            )
        if self.vision_encoder is None:
            import transformers

            model = self._loaded(transformers.AutoModel, self._fetched("vision"))
            self.register_modules(vision_encoder=model)
        return encode_picture(self._ready("vision"), shown, trained["options"], self._execution_device)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 [B, H, W, 3] of f32 [B, C, h, w]."""
        trained = self.config.facts["encoders"]["vae"]
        if trained["id"] == "builtin:dct":
            return DctVae().decode(latents.cpu().numpy())
        if self.vae is None:
            import diffusers

            kind = getattr(diffusers, trained["options"]["class"])
            self.register_modules(vae=self._loaded(kind, self._fetched("vae")))
        return decode(self._ready("vae"), latents.to(self._execution_device))

    def _fetched(self, name: str) -> Path:
        """The folder of an encoder that is not bundled: the Hub's files in the cache, or a folder of that name."""
        from huggingface_hub import snapshot_download

        trained = self.config.facts["encoders"][name]
        repository, _, revision = trained["id"].partition("@")
        if Path(trained["id"]).is_dir():
            folder = Path(trained["id"])
        elif repository.count("/") == 1 and not repository.startswith((".", "/", "~")):
            revision = trained["revision"] or revision or None
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns(name)))
        else:
            part = COMPONENTS[name]
            raise ValueError(
                f"the {name} encoder {trained['id']!r} of the training set is not here: load it and give it by "
                f"pipe.register_modules({part}=...){', with tokenizer=,' if name == 'text' else ''} or export with "
                "--bundle all"
            )
        folder = folder / "vae" if name == "vae" and (folder / "vae").is_dir() else folder
        if trained["sha256"] and digest(folder, name) != trained["sha256"]:
            raise ValueError(
                f"{folder} has other weights than the {name} encoder {trained['id']!r} of the training set (sha256 "
                f"{trained['sha256'][:12]}): pictures would come out wrong"
            )
        return folder

    def _loaded(self, kind: Any, folder: Path) -> Any:
        return kind.from_pretrained(str(folder), use_safetensors=True).eval()

    def _ready(self, name: str) -> Any:
        """An encoder where this pipeline runs and in the dtype that the dataset was made with, the VAE in f32; where
        offloading looks after it, as it is."""
        component = getattr(self, COMPONENTS[name])
        if any(hasattr(part, hook) for part in component.modules() for hook in ("_hf_hook", "_diffusers_hook")):
            return component
        # diffusers' own `to` warns of layers that are to stay f32, of which there are none.
        return torch.nn.Module.to(component, self._execution_device, self._dtype_of(name))

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name == "vae" else getattr(torch, self.config.facts["encoders"][name]["dtype"])

    # ------------------------------------------------------------------------------------------------- arguments

    @property
    def _factor(self) -> int:
        """Pixels a latent's side."""
        return self.config.facts["encoders"]["vae"]["options"]["factor"]

    def _check(
        self,
        prompts: list[str],
        reference: Image.Image | None,
        scales: list[float],
        rescale: float,
        seed: int,
        count: int,
        output_type: str,
    ) -> None:
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompt must be a text or several, got {prompts!r}")
        if reference is not None and not isinstance(reference, Image.Image):
            raise ValueError(f"reference must be a picture of PIL, as Image.open gives, got {type(reference).__name__}")
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"guidance scales must be finite numbers, got {', '.join(map(str, scales))}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be between 0 and 1, got {rescale}")
        if count < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {count}")
        if not isinstance(seed, numbers.Integral) or seed < 0 or seed + count * len(prompts) > 2**31:
            raise ValueError(f"seed must be 0 to 2**31 - 1, counted up for every picture, got {seed}")
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type must be pil, np or latent, got {output_type!r}")

    def _size(self, width: int | None, height: int | None) -> Size:
        if width is None and height is None:
            return self.sizes[0]
        for w, h, _ in self.config.facts["sizes"]:
            if (w, h) == (width, height):
                return int(w), int(h)
        trained = ", ".join(f"{w}x{h}" for w, h in self.sizes)
        raise ValueError(f"{width}x{height} (width x height): this model was not trained on it, but on {trained}")

    def _wanted(
        self, texts: list[torch.Tensor], reference: Image.Image | None, conditions: dict[str, np.ndarray]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """What the network is given of each condition, for all pictures."""
        given = {name: np.asarray(value, np.float32) for name, value in conditions.items()}
        if reference is not None and "vision" in given:
            raise ValueError("reference and conditions both give the vision vector: give one")
        if reference is not None:
            given["vision"] = self.encode_reference(reference)
        kinds = {name: (width, kind == "sequence") for name, width, kind in self.transformer.config.conditions}
        lengths = [len(text) for text in texts]
        text = torch.zeros(len(texts), max(lengths), texts[0].shape[1], dtype=texts[0].dtype)
        for row, one in enumerate(texts):
            text[row, : len(one)] = one
        wanted = {"text": {"text": text, "text_length": torch.tensor(lengths)}}
        for name, value in given.items():
            if name not in kinds or name == "text":
                others = ", ".join(other for other in kinds if other != "text")
                raise ValueError(f"conditions has {name!r}; besides the prompt this model takes {others}")
            width, sequence = kinds[name]
            if not sequence:
                value = value.reshape(-1) if value.shape[:-1] in ((), (1,)) else value
                length = float(np.linalg.norm(value.astype(np.float64)))
                if not (np.isfinite(length) and length > 0):
                    raise ValueError(f"conditions[{name!r}] must be a vector of finite numbers that are not all 0")
                value = (value / length).astype(np.float32)
            if value.ndim != 1 + sequence or value.shape[-1] != width:
                raise ValueError(
                    f"conditions[{name!r}] must be {'[tokens, ' if sequence else '['}{width}], got {list(value.shape)}"
                )
            wanted[name] = {name: torch.from_numpy(value).expand(len(texts), *value.shape)}
            if sequence:
                wanted[name][f"{name}_length"] = torch.full((len(texts),), len(value))
        device = self._execution_device
        return {name: {key: value.to(device) for key, value in parts.items()} for name, parts in wanted.items()}

    def _unpatched(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Tokens [B, N, P] to latents f32 [B, C, h, w] as the dataset stores them."""
        facts, config = self.config.facts, self.transformer.config
        C, p = config.channels, config.patch
        grid = tokens.float().reshape(len(tokens), rows, columns, p, p, C)
        latents = grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), C, rows * p, columns * p)
        mean, std = (
            torch.tensor(facts[name], device=tokens.device)[:, None, None] for name in ("latent_mean", "latent_std")
        )
        return latents * std + mean
