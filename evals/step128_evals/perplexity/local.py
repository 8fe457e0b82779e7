"""Scores through transformers, on this machine: the second opinion on what an endpoint says.

The only file of this room that imports torch and transformers, and only when it is used.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from step128_evals.errors import BadInputError, ConfigurationError, InputNotFoundError
from step128_evals.files import read_text
from step128_evals.perplexity.scoring import Scores
from step128_evals.perplexity.windows import Window
from step128_evals.probe import CAPABILITIES, Capability, Endpoint

_ROWS_AT_ONCE = 256  # of log-probabilities: 128896 of them each in float32


class LocalScorer:
    """Of a checkpoint that :func:`load_local` loaded."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any, dtype: str, limit_tokens: int | None) -> None:
        lacking = Capability(False, "a checkpoint in transformers is no server")
        can = {"tokenize": Capability(True, "transformers"), "prompt_logprobs": Capability(True, "transformers")}
        server = f"transformers {importlib.metadata.version('transformers')}, {dtype} on {model.device}"
        name = folder.resolve().name
        capabilities = {capability: can.get(capability, lacking) for capability in CAPABILITIES}
        self.endpoint = Endpoint(f"local:{folder}", server, name, limit_tokens, capabilities)
        self._model, self._tokenizer, self._dtype, self._limit = model, tokenizer, dtype, limit_tokens
        self._one_at_a_time = asyncio.Lock()

    @property
    def limit_tokens(self) -> int | None:
        """The positions that the model was made for."""
        return self._limit

    @property
    def has_tokenizer(self) -> bool:
        """Always."""
        return True

    @property
    def settings(self) -> dict[str, str]:
        """The type of weights and computation."""
        return {"dialect": "transformers", "dtype": self._dtype}

    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """By the checkpoint's tokenizer."""
        # Not verbose: a text is longer than the model's context, and cut later.
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    async def usual_prefix(self) -> int | None:
        """The tokenizer's ``bos_token_id``, else its ``eos_token_id``."""
        bos: int | None = self._tokenizer.bos_token_id
        eos: int | None = self._tokenizer.eos_token_id
        return eos if bos is None else bos

    async def score(self, window: Window, top_k: int) -> Scores:
        """One forward pass."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._score, window, top_k)

    def _score(self, window: Window, top_k: int) -> Scores:
        import torch

        if isinstance(window.prompt, str):
            raise TypeError("a window of token ids is needed")
        ids = torch.tensor([window.prompt], device=self._model.device)
        logprobs: list[float] = []
        top: list[dict[int | str, float]] = []
        with torch.inference_mode():
            logits = self._model(input_ids=ids, use_cache=False).logits[0]
            for start in range(window.first_scored, ids.shape[1], _ROWS_AT_ONCE):
                targets = ids[0, start : start + _ROWS_AT_ONCE]
                rows = torch.log_softmax(logits[start - 1 : start - 1 + len(targets)].float(), dim=-1)
                logprobs += rows.gather(1, targets[:, None])[:, 0].tolist()
                if top_k:
                    values, tokens = rows.topk(min(top_k, rows.shape[1]), dim=-1)
                    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
                    top += [dict(zip(names, figures, strict=True)) for names, figures in pairs]
        return Scores(window.prompt[window.first_scored :], tuple(logprobs), tuple(top))


def load_local(folder: Path, dtype: str, device: str | None) -> LocalScorer:
    """Load a checkpoint folder.

    Args:
        folder: with config.json, weights and tokenizer.
        dtype: ``float32``, ``bfloat16`` or ``float16``; of weights and computation (log-probabilities are float32).
        device: as torch names it; None: ``cuda`` (ROCm's name too) if there is one.

    Raises:
        InputNotFoundError: no such folder, or no config.json.
        BadInputError: it is quantized to NL4, or transformers cannot load it whole.
        ConfigurationError: there is no such device.
    """
    config = _read_config(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "nl4":
        raise BadInputError(
            f"{folder} is quantized to NL4, which transformers cannot read. Expand it first: "
            f"`step128-checkpoint dequantize {folder} OUT --dtype float32`, and pass OUT."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    vision = "vision_config" in config
    auto: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading = auto.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError, ImportError) as error:
        reason, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise BadInputError(f"{folder}: transformers cannot load it: {reason}") from error
    # It would fill what is missing with random numbers, and the perplexity would be of those.
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[kind])):
            raise BadInputError(f"{folder}: transformers reports {kind.replace('_', ' ')}: {', '.join(names[:3])}")
    try:
        model = model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"the model cannot go to the device {device or 'cuda'}: {error}") from error
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings")
    return LocalScorer(folder, model, tokenizer, dtype, limit if isinstance(limit, int) else None)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputNotFoundError(f"{folder}: no such folder")
    try:
        config = json.loads(read_text(folder / "config.json"))
    except ValueError as error:
        raise BadInputError(f"{folder / 'config.json'}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInputError(f"{folder / 'config.json'}: a JSON object was expected")
    return config
