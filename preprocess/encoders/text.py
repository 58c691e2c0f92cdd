"""Any T5 encoder of transformers as a `TextEncoder`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess import PreprocessError
from preprocess.encoders import device as devices
from preprocess.encoders import weights

OPTION = "--text-encoder"
TOKENIZER_FILES = ("tokenizer*.json", "spiece.model", "special_tokens_map.json", "added_tokens.json")
_BATCH_TOKENS = 8192  # padded tokens in one batch: 16 captions of 512, or 128 of 64
_BATCH_CAPTIONS = 128


class T5Text:
    """The encoder half of a T5 model with its tokenizer.

    Captions are encoded in batches of similar length with an attention mask and cut back to their own
    tokens: the encoder's output at padded places is not zero and must not be stored.

    Args: see `preprocess.encoders.load_text_encoder`.
    """

    def __init__(self, spec: str, device: str, dtype: str, max_tokens: int) -> None:
        found = weights.find(spec, OPTION, weights.TRANSFORMERS_WEIGHTS, extra=TOKENIZER_FILES)
        if found.config.get("model_type") not in ("t5", "mt5", "umt5"):
            raise PreprocessError(
                f"{OPTION} {spec}: config.json says model_type {found.config.get('model_type')!r}; a T5 model is needed"
            )
        self._device = devices.choose_device(device)
        self._dtype = devices.choose_dtype(dtype, self._device)
        self.max_tokens = max_tokens
        self.truncated = 0
        self._tokenizer, self._model = self._load(found)
        end = self._tokenizer.eos_token_id
        if end is None or self._tokenizer("a").input_ids[-1] != end:
            raise PreprocessError(
                f"{OPTION} {spec}: its tokenizer does not end a sequence with the end token </s>; T5 needs it"
            )
        self.identity = EncoderIdentity(
            id=spec,
            revision=found.revision,
            sha256=found.sha256,
            dtype=devices.dtype_name(self._dtype),
            width=int(self._model.config.d_model),
            options={"class": type(self._model).__name__, "max_tokens": max_tokens},
        )

    def _load(self, found: weights.Found) -> tuple[Any, Any]:
        import transformers

        name = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
        try:
            with devices.quiet_loading():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    found.directory, local_files_only=True, trust_remote_code=False
                )
                model, info = getattr(transformers, name[found.config["model_type"]]).from_pretrained(
                    found.directory,
                    use_safetensors=True,
                    local_files_only=True,
                    dtype=self._dtype,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise PreprocessError(f"{OPTION} {found.spec}: cannot be loaded: {error}") from error
        devices.refuse_missing(list(info["missing_keys"]), OPTION, found.spec)
        return tokenizer, model.eval().requires_grad_(False).to(self._device)

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """One bfloat16 [n, width] per caption, in order: its n tokens including the end token.

        A caption of more than `max_tokens` tokens keeps the first ones and the end token, and is counted in
        `truncated`.
        """
        if not captions:
            return []
        tokens = self._tokenize(captions)
        order = sorted(range(len(captions)), key=lambda i: (len(tokens[i]), i))
        encoded: dict[int, np.ndarray] = {}
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and stop - start < _BATCH_CAPTIONS:
                if len(tokens[order[stop]]) * (stop + 1 - start) > _BATCH_TOKENS:
                    break
                stop += 1
            rows = order[start:stop]
            encoded.update(zip(rows, self._encode([tokens[i] for i in rows])))
            start = stop
        return [encoded[i] for i in range(len(captions))]

    def count(self, captions: list[str]) -> list[int]:
        """Tokens of each caption with the end token, before any is cut."""
        return [len(ids) for ids in self._tokenizer(captions, verbose=False).input_ids] if captions else []

    def _tokenize(self, captions: list[str]) -> list[list[int]]:
        tokens = self._tokenizer(captions, verbose=False).input_ids
        for i, ids in enumerate(tokens):
            if len(ids) > self.max_tokens:
                self.truncated += 1
                tokens[i] = ids[: self.max_tokens - 1] + [self._tokenizer.eos_token_id]
        return tokens

    @torch.inference_mode()
    def _encode(self, tokens: list[list[int]]) -> list[np.ndarray]:
        longest = max(len(ids) for ids in tokens)
        ids = torch.zeros(len(tokens), longest, dtype=torch.long)
        mask = torch.zeros(len(tokens), longest, dtype=torch.long)
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        try:
            hidden = self._model(ids.to(self._device), attention_mask=mask.to(self._device)).last_hidden_state
            hidden = devices.to_bf16(hidden)
        except torch.OutOfMemoryError as error:
            if len(tokens) == 1:
                raise PreprocessError(
                    f"{OPTION}: one caption of {longest} tokens does not fit the device's memory; use --dtype "
                    "bfloat16, --device cpu or a smaller --max-tokens"
                ) from error
            torch.cuda.empty_cache()
            middle = len(tokens) // 2
            return self._encode(tokens[:middle]) + self._encode(tokens[middle:])
        return [hidden[row, : len(one)].copy() for row, one in enumerate(tokens)]
