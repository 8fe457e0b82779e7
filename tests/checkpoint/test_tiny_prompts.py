"""The chat template and tokenizer: what is trained on is what is served."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from tokenizers import Tokenizer

from step128_checkpoint.tiny import corpus, dialogues
from step128_checkpoint.tiny.config import VOCAB_SIZE
from step128_checkpoint.tiny.tokenizer import MARKUP, TURN_END, render, special_ids, train_tokenizer

USER = {"role": "user", "content": "What is the weather in Paris?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": arguments}}


def test_prompt_ends_inside_the_reasoning() -> None:
    prompt = render([USER], add_generation_prompt=True)
    assert prompt == ("<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_reasoning_level_is_a_line_of_the_system_turn(effort: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    prompt = render(messages, reasoning_effort=effort)
    assert prompt.startswith(
        f"<|im_start|>system\nBe brief.\n\nReasoning effort: {effort}<|im_end|>\n<|im_start|>user\n"
    )
    assert prompt.count("<|im_start|>system") == 1


def test_unknown_reasoning_level_is_left_out() -> None:
    assert render([USER], reasoning_effort=None) == render([USER])


def test_tools_are_listed_and_calls_have_the_parsers_grammar() -> None:
    answer = {
        "role": "assistant",
        "reasoning_content": "I call it.",
        "tool_calls": [call({"city": "Paris", "days": 2})],
    }
    text = render([USER, answer, {"role": "tool", "content": "sunny"}], tools=[WEATHER], add_generation_prompt=True)
    assert '<tools>\nget_weather: Get the weather of a city\n{"type": "object"' in text
    assert (
        "<|im_start|>assistant\n<think>\nI call it.\n</think>\n<tool_call>\n<function=get_weather>\n"
        "<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    ) in text


def test_two_tool_responses_share_a_turn() -> None:
    answer = {"role": "assistant", "content": "", "tool_calls": [call({"city": "Rome"}), call({"city": "Oslo"})]}
    text = render([USER, answer, {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}])
    assert text.count("<tool_call>") == 2
    assert (
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>" in text
    )


def test_image_parts_become_one_placeholder_in_their_place() -> None:
    content = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": " what is it?"}]
    assert "Look: <im_patch> what is it?" in render([{"role": "user", "content": content}])


def test_dialogues_are_the_same_for_the_same_seed_and_call_only_offered_tools() -> None:
    first = corpus.dialogue_texts(300, 1)
    assert first == corpus.dialogue_texts(300, 1) != corpus.dialogue_texts(300, 2)
    called = 0
    for text in first:
        for name in re.findall(r"<function=(\w+)>", text.split("</tools>")[-1]):
            called += 1
            assert f"\n{name}: " in text.split("</tools>")[0]
        assert text.endswith("<|im_end|>\n")
    assert called > 50


def test_weather_dialogue_without_the_tool_makes_no_call() -> None:
    rng = random.Random(3)
    for _ in range(200):
        dialogue = dialogues.tool_dialogue(rng)
        if "tools" not in dialogue.variables:
            assert not any(message.get("tool_calls") for message in dialogue.messages)


def test_held_out_files_are_not_trained_on() -> None:
    held_out = corpus.held_out_text()
    assert len(held_out) > 50_000
    assert not any(
        text.removesuffix("<|end_of_sentence|>") in held_out for text in corpus.training_files() if len(text) > 500
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*list(corpus.training_files())[:60], *corpus.dialogue_texts(300, 0)])


def test_tokenizer_fills_the_vocabulary_and_round_trips(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    ids = special_ids(tokenizer)
    assert (ids.begin, ids.end, ids.pad) == (0, 1, 2) and ids.image > 2000
    text = "def f(x):\n\treturn 'äß 漢字' + str(x)  # ok\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_markup_survives_decoding_and_turn_marks_do_not(tokenizer: Tokenizer) -> None:
    text = "<think>\nHm.\n</think>\n<tool_call>\n<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert all(tokenizer.token_to_id(mark) in ids for mark in ("<think>", "</think>", "<tool_call>"))
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(TURN_END)
    assert len(MARKUP) == 6


def test_a_prompt_is_a_prefix_of_the_training_text_in_tokens(tokenizer: Tokenizer) -> None:
    answer = {"role": "assistant", "reasoning_content": "The user asks.", "content": "Sunny."}
    whole = tokenizer.encode(render([USER, answer])).ids
    prompt = tokenizer.encode(render([USER], add_generation_prompt=True)).ids
    assert whole[: len(prompt)] == prompt
