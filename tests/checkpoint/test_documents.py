"""Conversations in their dialects, and documents from datasets: what is read, and the sentence for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mixture_texts import decoded, words

from step128_checkpoint.calibration.building.build import build_samples
from step128_checkpoint.calibration.building.documents import conversation, question
from step128_checkpoint.calibration.building.encoding import Encoder
from step128_checkpoint.calibration.building.mixture import Mixture, Part
from step128_checkpoint.calibration.building.sources import open_source
from step128_checkpoint.errors import CheckpointError, ConfigurationError


def test_a_conversation_that_the_template_refuses_is_left_out(tokenizer: Path, tmp_path: Path) -> None:
    """One of many; if it is the first of its part, all may be wrong: that is an error (see test_samples.py)."""
    folder, chats = tmp_path / "tokenizer", tmp_path / "chats"
    shutil.copytree(tokenizer, folder)
    template = (folder / "chat_template.jinja").read_text()
    odd = "{%- if 'ODD' in messages[0].content %}{{ raise_exception('odd') }}{% endif -%}"
    (folder / "chat_template.jinja").write_text(odd + template)
    chats.mkdir()
    lines = [{"messages": [{"role": "user", "content": words(i, 30)}]} for i in range(20)]
    lines[7]["messages"][0]["content"] = lines[11]["messages"][0]["content"] = "ODD"
    (chats / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixture = Mixture("m", (Part("chats", "chat", f"folder:{chats}", 1),))
    samples = build_samples(mixture, folder, tmp_path / "set", samples=100, tokens_per_sample=128)
    assert samples.mixture[0].left_out == 2
    assert "ODD" not in "".join(decoded(samples, tokenizer))


MESSAGES = [
    {"role": "user", "content": "What is the time in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": '{"city": "Oslo"}'}}],
    },
    {"role": "tool", "content": "12:30"},
    {"role": "assistant", "content": "<think>It says 12:30.</think>It is 12:30."},
]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def test_dialects_are_one(tokenizer: Path) -> None:
    """OpenAI's, ShareGPT's and JSON in JSON give the same document."""
    plain = conversation("x", MESSAGES, [TOOL])
    sharegpt = [
        {"from": "human", "value": "What is the time in Oslo?"},
        MESSAGES[1] | {"tool_calls": [{"name": "clock", "arguments": {"city": "Oslo"}}]},
        {"from": "observation", "value": "12:30"},
        {"from": "gpt", "value": "It is 12:30.", "reasoning_content": "It says 12:30."},
    ]
    bare = [{"name": "clock", "parameters": {"type": "object", "properties": {}}}]
    assert conversation("x", {"conversations": sharegpt}, bare) == plain
    assert conversation("x", json.dumps(MESSAGES), json.dumps([TOOL])) == plain
    text = Encoder(tokenizer).decode(Encoder(tokenizer).encode(plain).ids)
    assert "<think>\nIt says 12:30.\n</think>\nIt is 12:30.<|im_end|>" in text
    assert "<function=clock>\n<parameter=city>\nOslo\n</parameter>" in text
    calls = '[{"name": "clock", "arguments": {"city": "Oslo"}}]'
    xlam = question("x", "Oslo?", calls=calls, tools='[{"name": "clock", "parameters": {"city": {"type": "string"}}}]')
    assert xlam.tools[0]["function"]["parameters"] == {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "a list of messages is needed"),
        ('{"messages": [{"role": "narrator", "content": "x"}]}', "role is 'narrator'"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content must be text"),
        ('{"messages": ["hello"]}', "a message must be an object"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "must have a name"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "a tool must have a name"),
    ],
)
def test_bad_conversation_is_named(line: str, message: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "chats").mkdir()
    path = tmp_path / "chats" / "a.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES, "tools": [TOOL]}) + "\n" + line + "\n")
    mixture = Mixture("m", (Part("chats", "tools", f"folder:{path.parent}", 1),))
    with pytest.raises(CheckpointError, match=message) as caught:
        build_samples(mixture, tokenizer, tmp_path / "set", samples=4, tokens_per_sample=1024)
    assert f"{path}, line 2" in str(caught.value)
    assert not (tmp_path / "set").exists()


def dataset(folder: Path, rows: list[dict[str, object]]) -> str:
    """A dataset as the hub's: a folder that the `datasets` library opens by its path."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def test_dataset_is_streamed(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the `datasets` library itself, from a local folder: texts, conversations, calls as xlam has them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    calls = '[{"name": "clock", "arguments": {"city": "Oslo"}}]'
    tools = '[{"name": "clock", "description": "time", "parameters": {"city": {"type": "string"}}}]'
    parts = (
        Part(
            "text", "text", dataset(tmp_path / "a", [{"body": words(i, 60)} for i in range(50)]), 1, text_column="body"
        ),
        Part(
            "chat",
            "chat",
            dataset(
                tmp_path / "b", [{"messages": [{"role": "user", "content": words(900 + i, 40)}]} for i in range(50)]
            ),
            1,
            messages_column="messages",
        ),
        Part(
            "calls",
            "tools",
            dataset(
                tmp_path / "c", [{"query": words(500 + i, 40), "answers": calls, "tools": tools} for i in range(50)]
            ),
            1,
            question_column="query",
            calls_column="answers",
            tools_column="tools",
        ),
    )
    samples = build_samples(Mixture("m", parts), tokenizer, tmp_path / "set", samples=12, tokens_per_sample=256)
    assert [part.samples for part in samples.mixture] == [4, 4, 4]
    for i, text in enumerate(decoded(samples, tokenizer)):
        assert ("<tools>" in text) == (samples.domain(i) == "calls")
        assert ("<|im_start|>user" in text) == (samples.domain(i) != "text")


def test_bad_dataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    source = dataset(tmp_path / "a", [{"body": "x", "other": 1}])

    def refused(error: type[CheckpointError], message: str, **options: object) -> None:
        with pytest.raises(error, match=message):
            next(open_source(Part("p", "text", **{"source": source, "weight": 1, **options}), 0, 128))

    refused(ConfigurationError, "has no column 'text'. It has: body, other", text_column="text")
    refused(ConfigurationError, "a dataset for kind text needs text_column")
    refused(CheckpointError, "split test, cannot be opened", text_column="body", split="test")
    refused(CheckpointError, "cannot be opened", text_column="body", source=f"hf:{tmp_path / 'nowhere'}")
    refused(CheckpointError, "row 1 as shuffled: neither messages nor JSON: 'x'", messages_column="body")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(ConfigurationError, r"needs the package datasets. Install it: pip install", text_column="body")
