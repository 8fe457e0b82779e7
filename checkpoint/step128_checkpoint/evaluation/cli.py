"""``perplexity DIR``: perplexity of a checkpoint and, with a reference, what quantization or pruning changed."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from step128_checkpoint.calibration.samples import open_samples
from step128_checkpoint.commands.options import positive
from step128_checkpoint.devices import find_device
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.evaluation.blockwise import (
    Comparison,
    Evaluation,
    EvaluationOptions,
    Subject,
    compare,
    evaluate,
    work_tokens,
)
from step128_checkpoint.evaluation.kv_cache import KV_CACHES
from step128_checkpoint.evaluation.memory import check_memory
from step128_checkpoint.evaluation.windows import Windows, sample_windows, text_windows
from step128_checkpoint.files import reading
from step128_checkpoint.reader import Checkpoint, open_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command `perplexity`; sets `run` as its function."""
    parser = commands.add_parser(
        "perplexity",
        description="Perplexity of a checkpoint, plain or NL4, computed layer by layer: needs memory for one layer and "
        "the hidden states, whatever the model's size. With --reference also the mean KL divergence from it and how "
        "often both find the same next token likeliest.",
        epilog="Exit codes: 0 done, 65 bad checkpoint, text or samples, 66 not found, 78 an option is wrong or the "
        "memory too small.",
    )
    parser.add_argument("input", type=Path, metavar="DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text file")
    source.add_argument("--samples-from", type=Path, metavar="SAMPLES", help="a set made by `samples`")
    parser.add_argument("--held-out", action="store_true", help="of the samples, only those that calibration left out")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="compare with this one, its KV cache bf16")
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        default="bf16",
        help="fp8: K and V rounded to e4m3 with the checkpoint's scales; fp8-unit: with scales of 1 (default: bf16)",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="score about so many (default: all)")
    parser.add_argument(
        "--window", type=positive, default=2048, metavar="N", help="tokens of a window of --text (default: %(default)s)"
    )
    parser.add_argument("--batch-tokens", type=positive, default=8192, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), help="of the computation (default: float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print; returns the exit code."""
    device = find_device(arguments.device)
    dtype = _DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    checkpoint = open_checkpoint(arguments.input)
    reference = open_checkpoint(arguments.reference) if arguments.reference else None
    if reference is not None:
        _same_tokenizer(checkpoint, reference)
    windows, source = _windows(arguments)
    options = EvaluationOptions(arguments.kv_cache, dtype, device, arguments.batch_tokens)
    subject = Subject(checkpoint, options)
    base = Subject(reference, EvaluationOptions("bf16", dtype, device, arguments.batch_tokens)) if reference else None
    for one in filter(None, (subject, base)):
        check_memory(one, windows, models=2 if base else 1)
    result: Evaluation | Comparison
    with _progress(sum(work_tokens(one.checkpoint, windows) for one in (subject, base) if one)) as on_tokens:
        if base is None:
            result, found = evaluate(checkpoint, windows, options, on_tokens), None
        else:
            found, (result,) = compare(base, [subject], windows, on_tokens)
    report = _report(arguments, windows, source, options, result, found)
    if arguments.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def _windows(arguments: argparse.Namespace) -> tuple[Windows, dict[str, str]]:
    if arguments.text is None:
        samples = open_samples(arguments.samples_from)
        windows = sample_windows(samples, arguments.held_out, arguments.tokens)
        return windows, {"samples": str(arguments.samples_from), "samples_sha256": samples.sha256}
    if arguments.held_out:
        raise ConfigurationError("--held-out is for --samples-from; a text has no samples")
    with reading(arguments.text):
        data = arguments.text.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{arguments.text}: not UTF-8 text: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.input, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{arguments.input}: its tokenizer cannot be read: {error}") from error
    windows = text_windows(tokenizer, text, arguments.window, arguments.tokens)
    return windows, {"text": str(arguments.text), "text_sha256": hashlib.sha256(data).hexdigest()}


def _same_tokenizer(checkpoint: Checkpoint, reference: Checkpoint) -> None:
    """Two models that number tokens differently cannot be compared token by token."""
    paths = [one.folder / "tokenizer.json" for one in (checkpoint, reference)]
    if all(path.is_file() for path in paths) and paths[0].read_bytes() != paths[1].read_bytes():
        raise ConfigurationError(f"{paths[0]} and {paths[1]} differ: token by token they cannot be compared")


@contextmanager
def _progress(total_tokens: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokens x layers", total=total_tokens)
        yield lambda tokens: progress.advance(task, tokens)


def _report(
    arguments: argparse.Namespace,
    windows: Windows,
    source: dict[str, str],
    options: EvaluationOptions,
    result: Evaluation | Comparison,
    reference: Evaluation | None,
) -> dict[str, Any]:
    evaluation = result.evaluation if isinstance(result, Comparison) else result
    report: dict[str, Any] = {
        "checkpoint": str(arguments.input),
        "perplexity": evaluation.perplexity,
        "nll_per_token": evaluation.nll_per_token,
        "scored_tokens": evaluation.scored_tokens,
        "windows": len(windows.numbers),
        "definition": windows.definition,
        **source,
        "kv_cache": options.kv_cache,
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": str(options.device),
        "seconds": evaluation.seconds,
    }
    if isinstance(result, Comparison) and reference is not None:
        report |= {
            "reference": str(arguments.reference),
            "reference_perplexity": reference.perplexity,
            "mean_kl": result.mean_kl,
            "top1_agreement": result.top1_agreement,
        }
    return report


def _show(report: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"perplexity {report['perplexity']:.4f} ({report['nll_per_token']:.5f} nats a token), "
        f"{report['scored_tokens']} tokens in {report['windows']} windows, KV cache {report['kv_cache']}, "
        f"{report['dtype']} on {report['device']}, {report['seconds']:.1f} s"
    )
    if "reference" in report:
        console.print(
            f"reference {escape(report['reference'])}: perplexity {report['reference_perplexity']:.4f}; mean KL "
            f"{report['mean_kl']:.6f} nats, same likeliest token {100 * report['top1_agreement']:.2f} %"
        )
    console.print(f"definition: {escape(report['definition'])}")
