"""The tiny checkpoint's tokenizer: byte-level BPE trained on the corpus, with Step's special tokens, and its files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import MAX_POSITION_EMBEDDINGS, VOCAB_SIZE

BEGIN, END, PAD = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>"  # ids 0, 1, 2, as on the hub
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE, IMAGE_START, IMAGE_END = "<im_patch>", "<im_start>", "<im_end>"
CONTROL = (TURN_START, TURN_END, IMAGE, IMAGE_START, IMAGE_END, "<patch_start>", "<patch_end>", "<patch_newline>")
# Not "special": they must survive decoding with skip_special_tokens, for the reasoning and tool parsers to find them.
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ASSISTANT_TURN = f"{TURN_START}assistant\n"  # how the template opens what the model says
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that config.json and generation_config.json name."""

    begin: int
    end: int
    pad: int
    turn_end: int
    image: int

    @property
    def stop(self) -> list[int]:
        """Ids that end a generation."""
        return [self.end, self.pad, self.turn_end]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of exactly VOCAB_SIZE tokens; begin, end and pad are 0, 1, 2, the other special ones come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL) - len(MARKUP),
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in (BEGIN, END, PAD, *CONTROL)])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in MARKUP])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"the corpus gave a vocabulary of {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} are needed: "
            "is Python's standard library installed with its sources?"
        )
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Look the special ids up."""
    vocabulary = tokenizer.get_vocab()
    return SpecialIds(*(vocabulary[token] for token in (BEGIN, END, PAD, TURN_END, IMAGE)))


def template_text() -> str:
    """The chat template shipped in every tiny checkpoint."""
    return Path(__file__).with_name(TEMPLATE_FILE).read_text(encoding="utf-8")


@cache
def _compiled_template() -> jinja2.Template:
    # As transformers compiles it: sandboxed, blocks trimmed, JSON with non-ASCII kept and keys in the given order.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template_text())


def render(messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, **variables: Any) -> str:
    """The prompt text of a dialogue; `variables` are `tools` and `reasoning_effort`."""
    return _compiled_template().render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> text of everything about tokens and prompts in a checkpoint folder."""
    ids = special_ids(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": TURN_END,
        "pad_token": END,
        "add_bos_token": False,
        "model_max_length": MAX_POSITION_EMBEDDINGS,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"bos_token_id": ids.begin, "eos_token_id": ids.stop, "pad_token_id": ids.end}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
        TEMPLATE_FILE: template_text(),
        "generation_config.json": json.dumps(generation, indent=2),
    }
