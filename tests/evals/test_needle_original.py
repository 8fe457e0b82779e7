"""Our codeneedle against the original's own code, on its own files: every number must be equal.

The benchmark has no licence, so it is not in this repository: STEP128_CODENEEDLE names a clone of it.
"""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oracle import KEY, MODEL, Oracle, Reply

from step128_evals.cli import main
from step128_evals.needle.codeneedle.clone import CloneCorpus, read_corpus, read_template
from step128_evals.needle.codeneedle.scoring import count_lines, relaxed, strict
from step128_evals.needle.codeneedle.targets import Target, draw, find_targets
from step128_evals.needle.summary import summarize
from step128_evals.runs import read_run

CLONE = os.environ.get("STEP128_CODENEEDLE")
CORPORA = ("jquery", "http_server")
MUTATIONS = 40

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(CLONE is None, reason="STEP128_CODENEEDLE names no clone of alexziskind1/codeneedle"),
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work tree of the clone, which may be a git directory without one."""
    folder = tmp_path_factory.mktemp("codeneedle")
    archive = subprocess.run(["git", "-C", str(CLONE), "archive", "HEAD"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder.resolve()


@pytest.fixture(scope="module")
def original(clone: Path) -> Iterator[SimpleNamespace]:
    """The original's package, imported from the clone."""
    sys.path.insert(0, str(clone))
    modules = {name: importlib.import_module(f"bench.{name}") for name in ("extract", "scorer", "runner", "config")}
    yield SimpleNamespace(**modules)
    sys.path.remove(str(clone))
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        del sys.modules[name]


def ours(clone: Path, name: str) -> tuple[CloneCorpus, list[Target]]:
    corpus = read_corpus(clone, name)
    found = find_targets(corpus.text, corpus.language, corpus.path.name)
    return corpus, [Target(target.name, target.start_line + 1, target.body) for target in found]


def theirs(original: Any, clone: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.chdir(clone)  # it looks for the files from where it is run
    config = original.config.load_corpus(name)
    return config, original.extract.load_source_glob(config.directory, config.glob, config.limit)


def test_same_functions_same_draw_same_prompts(original: Any, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    template = read_template(clone)
    for name in CORPORA:
        config, source = theirs(original, clone, name, monkeypatch)
        corpus, targets = ours(clone, name)
        assert corpus.source == source.text
        assert [(t.name, t.start_line, list(t.body)) for t in targets] == [
            (t.name, t.start_line, t.body_lines) for t in source.targets
        ]
        total = source.text.count("\n") + 1
        for seed in (config.sample_seed, *range(200)):
            for count in (config.sample_k, 1, 5, 30):
                drawn = draw(targets, total, count, seed)
                wanted = original.extract.stratified_sample(source.targets, total, k=count, seed=seed)
                assert [target.name for target in drawn] == [target.name for target in wanted]
                compared += len(drawn)
        for no_think in (True, False):
            for target, their in zip(targets, source.targets, strict=True):
                prompt = template.fill(corpus.source, corpus.language, target.name, len(target.asked), no_think)
                assert prompt == original.runner._build_prompt(their, source.text, len(source.files) > 1, no_think)
                compared += 1
        print(f"{name}: {len(targets)} functions, {len(corpus.source)} characters")
    print(f"{compared} drawn functions and prompts are equal")


def answers(target: Target, rng: random.Random) -> Iterator[str]:
    """Answers of all kinds to one question."""
    asked, body = list(target.asked), list(target.body)
    text = "\n".join(asked)
    yield from ("", "\n\n", text, "\n".join(body), "\n".join(body[:60]), "\n".join(reversed(asked)))
    yield from (text[: len(text) // 2], "\n".join(asked[:8]), "\n".join(asked[:7]), text + "\n\n\n", "\n \n" + text)
    yield from ("\n".join("    " + line for line in asked), "\n".join(line.strip() for line in asked))
    yield from ("\n".join(line + "  \t" for line in asked), "\r\n".join(asked), text.replace("    ", "\t"))
    yield from (
        f"```js\n{text}\n```",
        f"Here it is:\n\n```\n{text}\n```\nThat is all.",
        f"```python\n{text}",
        text + "\n```",
    )
    yield from (f"```\na\n```\nand\n```\n{text}\n```", f"<think>\nLet me look.\n</think>\n\n{text}", "I do not know.")
    yield from ("\n".join(line for line in asked if line.strip()), "\n\n".join(asked), text + "\n" + text)
    for _ in range(MUTATIONS):
        lines = list(body[: rng.randint(1, 70)])
        for _ in range(rng.randint(1, 12)):
            place = rng.randrange(len(lines))
            lines[place : place + 1] = rng.choice(
                [
                    [],
                    [lines[place], lines[place]],
                    [lines[place], ""],
                    [lines[place] + ";"],
                    [" " + lines[place]],
                    [lines[place][1:]],
                    ["```"],
                    [rng.choice(body)],
                    ["invented()", lines[place]],
                    [lines[place] + "\x0c"],
                ]
            )
            lines = lines or [""]
        yield "\n".join(lines)


def test_same_scores(original: Any, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(42)
    compared = 0
    for name in CORPORA:
        _, source = theirs(original, clone, name, monkeypatch)
        _, targets = ours(clone, name)
        for target, their in zip(targets, source.targets, strict=True):
            for answer in answers(target, rng):
                for normal, relax in ((strict, False), (relaxed, True)):
                    counts = count_lines(target.asked, target.bonus, answer, normal)
                    wanted = original.scorer.score(
                        their.name, their.primary_lines, their.bonus_lines, answer, relax_indent=relax
                    )
                    assert (counts.matched, counts.asked, counts.hallucinated, counts.bonus, counts.passed) == (
                        wanted.primary_matched,
                        wanted.primary_total,
                        wanted.hallucinated,
                        wanted.bonus_matched,
                        wanted.passed,
                    ), answer
                    compared += 5
    print(f"{compared} numbers of scores are equal")


@pytest.mark.parametrize("name", CORPORA)
def test_same_run(
    name: str, original: Any, clone: Path, monkeypatch: pytest.MonkeyPatch, oracle: Oracle, tmp_path: Path
) -> None:
    """Both programs ask the same server, which answers the same: equal requests, equal figures."""
    config, source = theirs(original, clone, name, monkeypatch)
    corpus, targets = ours(clone, name)
    template = read_template(clone)
    rng = random.Random(42)
    said = {}
    for target in targets:
        prompt = template.fill(corpus.source, corpus.language, target.name, len(target.asked), no_think=True)
        said[prompt] = rng.choice([answer for answer in answers(target, rng) if answer.strip()])

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        content = str(body.get("messages", [{}])[0].get("content"))
        return Reply(said[content]) if content in said else None

    oracle.respond, oracle.context_tokens = respond, None
    client = original.runner.ClientConfig(base_url=oracle.url, model=MODEL, api_key=KEY)
    scores = original.runner.run_benchmark(source, client, k=config.sample_k, seed=config.sample_seed)
    wanted = [body for body in oracle.chats() if body["max_tokens"] == 6000]
    before = len(oracle.requests)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    out = tmp_path / "needle.jsonl"
    options = ["--codeneedle", str(clone), "--codeneedle-corpus", name, "--out", str(out)]
    assert main(["needle", "--base-url", oracle.url, "--mode", "codeneedle", *options]) == 0
    asked = [body for _, body in oracle.requests[before:] if body.get("max_tokens") == 6000]
    assert asked == wanted
    summary = summarize(read_run(out))
    assert summary["answered"] == len(scores)
    assert summary["strict"]["passed"] == sum(score.passed for score in scores)
    assert summary["strict"]["lines_matched"] == sum(score.primary_matched for score in scores)
    assert summary["strict"]["hallucinated"] == sum(score.hallucinated for score in scores)
    assert summary["strict"]["bonus"] == sum(score.bonus_matched for score in scores)
