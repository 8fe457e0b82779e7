"""A tiny model as a Hugging Face checkpoint folder, written so that it is either whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .network import TinyStep
from .tokenizer import tokenizer_files
from .vision import vision_tensors

WEIGHTS_FILE = "model.safetensors"
REPORT_FILE = "tiny_report.json"


def checkpoint_tensors(
    network: TinyStep, config: dict[str, Any], scales: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by hub name: weights bfloat16, router bias and KV scales float32."""
    weights = {
        name: tensor.detach().to(torch.float32 if name.endswith("router_bias") else torch.bfloat16).contiguous().clone()
        for name, tensor in network.state_dict().items()
    }
    return weights | vision_tensors(config, seed) | scales


def write_checkpoint(
    out: Path, tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: Tokenizer, report: dict[str, Any]
) -> None:
    """Write the folder `out`, which must not exist or be empty, in one step.

    Raises OSError if that fails; nothing is left then.
    """
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS_FILE)}
    texts = tokenizer_files(tokenizer) | {
        "config.json": json.dumps(config, indent=2),
        "model.safetensors.index.json": json.dumps(index, indent=2),
        REPORT_FILE: json.dumps(report, indent=2),
    }

    def fill(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        for name, text in texts.items():
            (folder / name).write_text(text + "\n", encoding="utf-8")

    _appear(out, fill)


def copy_checkpoint(source: Path, out: Path) -> None:
    """Copy a whole checkpoint folder to `out` in one step; a folder that is there is replaced."""

    def fill(folder: Path) -> None:
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)

    _appear(out, fill, replace=True)


def _appear(out: Path, fill: Callable[[Path], None], *, replace: bool = False) -> None:
    """Fill a hidden folder beside `out`, flush it to disk, and rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        fill(hidden)
        for path in [*hidden.iterdir(), hidden]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        hidden.chmod(0o755)
        if replace and out.exists():
            former = Path(tempfile.mkdtemp(prefix=f".{out.name}-former-", dir=out.parent))
            out.rename(former)  # onto an empty folder, which this replaces
            hidden.rename(out)
            shutil.rmtree(former)
        else:
            hidden.rename(out)  # replaces an empty folder, refuses one that is not
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
