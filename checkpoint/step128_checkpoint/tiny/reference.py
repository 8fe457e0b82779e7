"""Read a checkpoint folder back into the training model: an independent yardstick for perplexity and logits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from .config import text_spec
from .corpus import held_out_text
from .measure import perplexity
from .network import TinyStep

__all__ = ["held_out_tokens", "load_model", "perplexity"]


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> TinyStep:
    """The text part and MTP layers of an unquantized checkpoint folder (one or more safetensors files).

    Raises FileNotFoundError for a missing config or shard, KeyError for a missing or misshapen tensor, named.
    """
    path = Path(path)
    network = TinyStep(text_spec(json.loads((path / "config.json").read_text(encoding="utf-8"))))
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{path} holds no .safetensors file")
    found: dict[str, Tensor] = {}
    for shard in shards:
        found |= load_file(shard)
    expected = network.state_dict()
    wrong = [name for name, tensor in expected.items() if name not in found or found[name].shape != tensor.shape]
    if wrong:
        raise KeyError(f"{path}: {len(wrong)} tensors are missing or misshapen, the first is {wrong[0]}")
    network.load_state_dict({name: found[name] for name in expected})
    return with_dtype(network, dtype).eval().requires_grad_(False)


def with_dtype(network: TinyStep, dtype: torch.dtype) -> TinyStep:
    """Cast the parameters in place; the router biases stay float32, as they are stored."""
    biases = {name: buffer.float() for name, buffer in network.named_buffers()}
    network.to(dtype)
    for name, bias in biases.items():
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, bias)
    return network


def held_out_tokens(path: Path, count: int) -> Tensor:
    """The first `count` tokens, int64, of the held-out library text, by the checkpoint's own tokenizer."""
    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    return torch.tensor(tokenizer.encode(held_out_text()).ids[:count])
