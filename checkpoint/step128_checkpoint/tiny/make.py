"""Make a tiny trained checkpoint: tokenizer, training, measurements, folder; or copy the one made before.

Only the standard library is imported up here, so that asking for `--help` does not load torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DIALOGUES = 8000
FULL_MEASUREMENT_STEPS = 50  # below, the model knows nothing, and a quick look replaces the measurements
CALIBRATION_ROWS = (12, 4)  # of library text, of dialogues
HELD_OUT_TOKENS = 16384  # what the reported perplexity is measured on
DRAFT_PROMPTS, DRAFT_PROMPT_TOKENS, DRAFT_NEW_TOKENS = 16, 128, 48


class OutputExistsError(Exception):
    """The output folder exists and is not empty."""


@dataclass(frozen=True)
class TinyResult:
    """What was made, and how good it is. The same numbers, with the loss curve, are in tiny_report.json."""

    path: str
    parameters: int
    steps: int
    training_tokens: int
    held_out_perplexity: float
    unigram_perplexity: float
    mtp_acceptance: list[
        float
    ]  # share of drafts accepted at positions 1, 2, 3 of a greedy continuation of held-out text
    seconds: float
    cached: bool


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/step128 or ~/.cache/step128."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "step128"  # noqa: PTH111  never raises


def make_tiny(
    out: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: bool = True,
    force: bool = False,
) -> TinyResult:
    """Write the checkpoint folder `out`; the same recipe comes from `cache_dir` (None: the default) the second time.

    `steps` None is the full recipe (minutes on two cores); few steps give a model of the right structure only.
    Raises OutputExistsError if `out` is there and not empty, unless `force`; OSError if it cannot be written;
    FileNotFoundError if Python's standard library has no sources to learn from.
    """
    begun = time.monotonic()
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not force:
            raise OutputExistsError(f"{out} exists and is not an empty folder: choose another path, or pass --force")
        # Only a folder made by this command is ever removed.
        if not (out / "tiny_report.json").is_file():
            raise OutputExistsError(f"{out} was not made by this command (no tiny_report.json): remove it yourself")
    cache = (cache_dir or default_cache_dir()) / f"tiny-{_recipe_key(steps, seed)}"
    cached = (cache / "tiny_report.json").is_file()
    if not cached:
        for folder in (cache.parent, out.parent):
            _require_writable(folder)
        _train_into(cache, steps, seed, progress)
    from .export import copy_checkpoint

    copy_checkpoint(cache, out)
    report = json.loads((out / "tiny_report.json").read_text(encoding="utf-8"))
    report.pop("loss_curve")
    seconds = round(time.monotonic() - begun, 1)
    return TinyResult(**report | {"path": str(out), "seconds": seconds, "cached": cached})


def _require_writable(folder: Path) -> None:
    """Find out before minutes of training, not after. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _recipe_key(steps: int | None, seed: int) -> str:
    """Names all the result depends on: our sources, torch, Python (the corpus is its library), steps and seed."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.iterdir()):
        if source.suffix in {".py", ".jinja"} and source.name not in ("cli.py", "progress.py"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("torch", "tokenizers")]
    digest.update(repr((versions, sys.version, platform.machine(), steps, seed)).encode())
    return digest.hexdigest()[:16]


def _train_into(folder: Path, steps: int | None, seed: int, progress: bool) -> None:
    # Read when torch loads its OpenMP. Threads that spin for long while they wait make a step several times slower as
    # soon as anything else runs on the same cores; threads that never spin, 1.7 times slower on idle cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import torch

    from . import corpus
    from .batches import Batches
    from .config import VOCAB_SIZE, hub_config, text_spec
    from .export import checkpoint_tensors, write_checkpoint
    from .measure import draft_acceptance, kv_scales, perplexity, unigram_perplexity
    from .network import TinyStep
    from .progress import training_progress
    from .reference import with_dtype
    from .tokenizer import special_ids, train_tokenizer
    from .train import Recipe, train

    begun = time.monotonic()
    files, dialogues = list(corpus.training_files()), corpus.dialogue_texts(DIALOGUES, seed)
    tokenizer = train_tokenizer(files + dialogues)
    ids = special_ids(tokenizer)
    config = hub_config(image_token_id=ids.image, bos_token_id=ids.begin, eos_token_ids=ids.stop)
    torch.manual_seed(seed)
    network = with_dtype(TinyStep(text_spec(config)), torch.bfloat16)
    batches = Batches(tokenizer, files, dialogues, seed)
    recipe = Recipe(seed=seed) if steps is None else Recipe(seed=seed, steps=steps)
    curve: list[list[float]] = []
    with training_progress(recipe.steps, progress) as show:

        def record(step: int, losses: list[float]) -> None:
            curve.append([round(loss, 4) for loss in losses])
            show(step + 1, losses[0])

        train(network, batches, recipe, record)

    network.requires_grad_(False)
    held_out = torch.tensor(tokenizer.encode(corpus.held_out_text()).ids)
    full = recipe.steps >= FULL_MEASUREMENT_STEPS
    scales = kv_scales(network, batches.take(*CALIBRATION_ROWS))
    tokens = held_out[: HELD_OUT_TOKENS if full else 1024]
    prompt = _prompts(held_out[HELD_OUT_TOKENS:], DRAFT_PROMPTS if full else 1)
    tensors = checkpoint_tensors(network, config, scales, seed)
    result = TinyResult(
        path="",
        parameters=sum(t.numel() for name, t in tensors.items() if name not in scales),
        steps=recipe.steps,
        training_tokens=recipe.tokens,
        held_out_perplexity=round(perplexity(network, tokens), 3),
        unigram_perplexity=round(unigram_perplexity(batches.code.long(), tokens, VOCAB_SIZE), 3),
        mtp_acceptance=[round(a, 4) for a in draft_acceptance(network, prompt, DRAFT_NEW_TOKENS if full else 6)],
        seconds=round(time.monotonic() - begun, 1),
        cached=False,
    )
    # Two runs may race to the same cache entry: whoever comes second finds a whole one and drops its own.
    with suppress(FileExistsError):
        if not (folder / "tiny_report.json").is_file():
            write_checkpoint(folder, tensors, config, tokenizer, asdict(result) | {"loss_curve": curve})


def _prompts(tokens: Tensor, count: int) -> Tensor:
    """`count` pieces of the text, evenly spread, int64 [count, DRAFT_PROMPT_TOKENS]."""
    import torch

    stride = (len(tokens) - DRAFT_PROMPT_TOKENS) // count
    return torch.stack([tokens[i * stride : i * stride + DRAFT_PROMPT_TOKENS] for i in range(count)])
