"""``chat DIR``: asks a checkpoint questions through transformers, with nothing of ours but the dequantization."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import AutoTokenizer, TextStreamer

from step128_checkpoint.chat_model import DTYPES, load_model
from step128_checkpoint.commands.options import positive
from step128_checkpoint.devices import find_device
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.reader import open_checkpoint

Message = dict[str, str]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command `chat`; sets `run` as its function."""
    parser = commands.add_parser(
        "chat",
        description="Load a checkpoint, NL4 weights dequantized, into transformers' own Step-3.7 model and answer. For "
        "checking a checkpoint, not for serving one. Without --prompt: a conversation, ended by Ctrl-D.",
        epilog="Exit codes: 0 answered, 65 bad checkpoint, 66 not found, 78 too little memory, unknown device or "
        "missing package.",
    )
    parser.add_argument("input", type=Path, metavar="DIR")
    parser.add_argument("--prompt", metavar="TEXT", help="one question (default: ask on the terminal)")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    parser.add_argument("--json", action="store_true", help="with --prompt: print one JSON object")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Load, answer, print; returns the exit code."""
    if arguments.json and arguments.prompt is None:
        raise ConfigurationError("--json needs --prompt")
    notes = Console(stderr=True, soft_wrap=True)
    checkpoint = open_checkpoint(arguments.input)
    device = find_device(arguments.device)
    tokenizer = load_tokenizer(arguments.input)
    started = time.monotonic()
    model = load_model(checkpoint, DTYPES[arguments.dtype], device, lambda text: notes.print(escape(text)))
    notes.print(f"loaded in {time.monotonic() - started:.1f} s")
    streamer = None if arguments.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def ask(messages: list[Message]) -> tuple[str, int]:
        return answer(model, tokenizer, messages, arguments.max_new_tokens, streamer)

    if arguments.prompt is None:
        return converse(ask)
    started = time.monotonic()
    text, tokens = ask([{"role": "user", "content": arguments.prompt}])
    seconds = time.monotonic() - started
    if arguments.json:
        print(json.dumps({"prompt": arguments.prompt, "answer": text, "tokens": tokens, "seconds": seconds}))
    else:
        notes.print(f"{tokens} tokens in {seconds:.1f} s")
    return 0


def answer(
    model: Any, tokenizer: Any, messages: list[Message], max_new_tokens: int, streamer: Any = None
) -> tuple[str, int]:
    """Answer greedily, with the folder's chat template.

    Args:
        model: from :func:`load_model`.
        tokenizer: from :func:`load_tokenizer`.
        messages: the conversation so far, a user's message last.
        max_new_tokens: most tokens to generate.
        streamer: transformers' streamer, given the tokens as they come.

    Returns:
        The text without special tokens, and the number of tokens generated.
    """
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(
            **encoded,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
        )
    new = output[0, encoded["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def converse(ask: Callable[[list[Message]], tuple[str, int]]) -> int:
    """Ask on the terminal and answer until its end; every answer sees what was said before it."""
    messages: list[Message] = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if question.strip():
            messages.append({"role": "user", "content": question})
            text, _ = ask(messages)
            messages.append({"role": "assistant", "content": text})


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with its chat template.

    Raises:
        CheckpointError: there is none that can be read, or it has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise CheckpointError(f"{folder}: no chat template. Copy chat_template.jinja from the original model.")
    return tokenizer
