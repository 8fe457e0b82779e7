"""`step128-eval needle` end to end on the oracle: the score is exactly what the oracle was told to answer."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from needle_texts import copying, fenced, write_corpus
from oracle import KEY, Oracle, Reply

from step128_evals.cli import main
from step128_evals.needle import corrected_mode, summary
from step128_evals.runs import read_run

Needle = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def needle(
    oracle: Oracle, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Needle:
    """Runs the command: (exit code, report)."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    oracle.context_tokens = 10_000

    def run(*options: str, items: int = 12) -> tuple[int, dict[str, Any]]:
        common = ["--base-url", oracle.url, "--corpus", str(corpus), "--out", str(tmp_path / "needle.jsonl"), "--json"]
        sizes = ["--lengths", "2k,4k", "--depths", "0,50,100", "--items", str(items)]
        capsys.readouterr()
        code = main(["needle", *common, *sizes, *options])
        return code, json.loads(capsys.readouterr().out)

    return run


def asked(oracle: Oracle) -> list[dict[str, Any]]:
    """The requests of items, without those that probe."""
    return [body for body in oracle.chats() if "Write down" in str(body["messages"])]


TENTHS = "0,10,20,30,40,50,60,70,80,90,100"


def test_perfect_answers_are_100_of_100(oracle: Oracle, needle: Needle) -> None:
    oracle.respond = copying(lambda lines, _: fenced(lines))
    code, report = needle(
        "--lengths", "7k,9k", "--depths", TENTHS, "--max-tokens", "700", "--reasoning-effort", "low", items=100
    )
    assert code == 0
    for name in ("exact", "rstrip", "strip"):
        assert (report[name]["passed"], report[name]["rate"], report[name]["line_share"]) == (100, 1.0, 1.0)
    assert report["exact"]["interval"] == {"low": pytest.approx(0.96301, abs=1e-5), "high": 1.0}
    assert (report["answered"], report["invented_lines"], report["errors"]) == (100, 0, 0)
    assert report["headline"].startswith("100 of 100 exact (95 %: 96.3 to 100.0 %), up to ")
    assert sum(cell["answered"] for cell in report["cells"]) == 100
    assert {(cell["length"], cell["depth"]) for cell in report["cells"]} == {
        (length, depth) for length in (7168, 9216) for depth in range(0, 101, 10)
    }
    bodies = asked(oracle)
    assert {(b["temperature"], b["max_tokens"], b["reasoning_effort"]) for b in bodies} == {(0, 700, "low")}
    # The haystack first, the question last, and each haystack's questions one after the other.
    haystacks = [body["messages"][0]["content"].split("\n-----\n")[0] for body in bodies]
    assert sum(left != right for left, right in itertools.pairwise(haystacks)) == len(set(haystacks)) - 1 < 30


PERFECT, INDENTATION, LINE_ENDS, FAILED = (1, 1, 1), (0, 0, 1), (0, 1, 1), (0, 0, 0)
KINDS: list[tuple[Callable[[list[str]], Reply], tuple[int, int, int], float]] = [
    (fenced, PERFECT, 1),
    (lambda lines: Reply("\n".join(lines)), PERFECT, 1),
    (lambda lines: fenced([row for line in lines for row in (line, "", " ")]), PERFECT, 1),
    (lambda lines: Reply(f"Hm.</think>{fenced(lines).text}"), PERFECT, 1),
    (lambda lines: Reply(fenced(lines).text, reasoning=fenced(["no"]).text), PERFECT, 1),
    (lambda lines: fenced([line.strip() for line in lines]), INDENTATION, 0),
    (lambda lines: fenced([line + "\t" for line in lines]), LINE_ENDS, 0),
    (lambda lines: Reply("<think>Hm", finish_reason="length"), FAILED, 0),
    (lambda lines: Reply("", reasoning="Hm", finish_reason="length"), FAILED, 0),
    (lambda lines: Reply("```\n" + "\n".join(lines[:5]), finish_reason="length"), FAILED, 0.25),
    (lambda lines: fenced([*lines[:19], "    nothing = 0"]), FAILED, 0.95),
    (lambda lines: Reply("I do not know."), FAILED, 0),
]
"""What is answered; whether it passes under exact, rstrip and strip; the share of exact lines."""


def test_scores_are_exact(oracle: Oracle, needle: Needle) -> None:
    oracle.respond = copying(lambda lines, number: KINDS[number][0](lines))
    code, report = needle(items=len(KINDS))
    assert code == 0
    for index, name in enumerate(("exact", "rstrip", "strip")):
        assert report[name]["passed"] == sum(passes[index] for _, passes, _ in KINDS)
    assert report["exact"]["line_share"] == pytest.approx(sum(share for _, _, share in KINDS) / len(KINDS))
    assert (report["cut_by_budget"], report["invented_lines"]) == (3, 2)  # "nothing = 0", "I do not know."
    items = read_run(Path(report["results"])).items.values()
    for item, (_, passes, share) in zip(items, KINDS, strict=True):
        assert item.status == ("passed" if passes[0] else "failed")
        assert item.data["scores"]["exact"] == {"passed": bool(passes[0]), "lines": round(20 * share)}


def every_third_wrong(change: Callable[[list[str]], Reply]) -> Callable[[list[str], int], Reply]:
    return lambda lines, number: fenced(lines) if number % 3 else change(lines)


@pytest.mark.parametrize("bad", [Reply(status=500), Reply("x" * 99, cut_after=3)])
def test_errors_are_no_failures_and_are_asked_again(oracle: Oracle, needle: Needle, tmp_path: Path, bad: Reply) -> None:
    oracle.respond = copying(every_third_wrong(lambda _: bad))
    code, report = needle()
    assert code == 70
    assert (report["answered"], report["request_errors"], report["exact"]["passed"]) == (8, 4, 8)
    assert report["exact"]["rate"] == 1.0
    before = len(asked(oracle))
    oracle.respond = copying(lambda lines, _: fenced(lines))
    code, report = needle()
    assert code == 0
    assert len(asked(oracle)) == before + 4
    assert (report["answered"], report["exact"]["passed"], report["request_errors"]) == (12, 12, 0)


def test_the_whole_haystack_is_no_answer(oracle: Oracle, needle: Needle, tmp_path: Path) -> None:
    def dump(path: str, body: dict[str, Any]) -> Reply | None:
        haystack, cut, _ = str(body.get("messages", [{}])[0].get("content")).partition("\n-----\n")
        return Reply(f"```\n{haystack}\n```") if cut else None

    oracle.respond = dump
    code, report = needle()
    assert (code, report["exact"]["passed"], report["strip"]["passed"]) == (0, 0, 0)
    assert "lines are not the function's" in read_run(tmp_path / "needle.jsonl").with_status("failed")[0].why
    assert "last code block" in summary.text(report)


def test_without_usage_the_planned_tokens_are_told(oracle: Oracle, needle: Needle, tmp_path: Path) -> None:
    oracle.respond = copying(lambda lines, _: replace(fenced(lines), usage=False))
    _, report = needle()
    counted = [item.data["counted_prompt_tokens"] for item in read_run(tmp_path / "needle.jsonl").items.values()]
    assert report["longest_prompt_tokens"] == max(counted) > 3000
    assert report["headline"].endswith(f"up to {max(counted)} tokens")


def test_closed_book_asks_the_same_functions_without_the_haystack(
    oracle: Oracle, needle: Needle, tmp_path: Path
) -> None:
    oracle.respond = lambda path, body: Reply("no idea") if "from memory" in str(body) else None
    code, report = needle("--closed-book")
    assert code == 0
    assert (report["exact"]["passed"], report["closed_book"]) == (0, True)
    assert max(len(body["messages"][0]["content"]) for body in asked(oracle)) < 1000
    assert report["headline"].endswith("by heart")
    assert report["cells"] == []
    run = read_run(Path(report["results"]))
    figures = summary.summarize(run)
    shown = summary.text(figures) + summary.markdown(run, figures, tmp_path / "pictures")
    assert not any(word in shown for word in ("depth in", "\\ depth", "needle.svg"))  # there is no haystack
    assert "0/12" in shown
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    ("context", "options", "why"),
    [
        (3000, [], "a length of 4096 tokens is asked, and the model is served with a context of 3000"),
        (None, ["--lengths", "200"], "too short"),
        (10_000, ["--max-tokens", "9500"], "too short"),
    ],
)
def test_a_small_context_is_said_before_anything_is_asked(
    oracle: Oracle, needle: Needle, context: int | None, options: list[str], why: str
) -> None:
    oracle.context_tokens = context
    code, report = needle(*options)
    assert code == 4
    assert why in report["error"]
    assert not asked(oracle)


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        (["--depths", "0,101"], 65, "percentages"),
        (["--corpus", "/nowhere"], 66, "no such folder"),
        (["--codeneedle", "."], 65, "belongs to --mode codeneedle"),
        (["--lines", "90"], 65, "short enough"),
    ],
)
def test_wrong_options(needle: Needle, options: list[str], code: int, why: str) -> None:
    found, report = needle(*options)
    assert found == code
    assert why in report["error"]


def test_another_run_is_not_mixed_in(oracle: Oracle, needle: Needle) -> None:
    oracle.respond = copying(lambda lines, _: fenced(lines))
    assert needle()[0] == 0
    code, report = needle("--max-tokens", "99")
    assert code == 65
    assert "max_tokens was 2500 and is now 99" in report["error"]


def test_a_depth_named_twice_is_one(oracle: Oracle, needle: Needle) -> None:
    oracle.respond = copying(lambda lines, _: fenced(lines))
    assert needle("--depths", "0,100")[0] == 0
    before = len(asked(oracle))
    code, report = needle("--depths", "100,0,0,0,0")
    assert (code, report["items"], len(asked(oracle))) == (0, 12, before)


def test_other_words_of_a_question_or_another_scoring_are_another_run(
    oracle: Oracle, needle: Needle, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle.respond = copying(lambda lines, _: fenced(lines))
    assert needle()[0] == 0
    with monkeypatch.context() as other:
        other.setattr(corrected_mode, "question", lambda *_: "What comes next?")
        code, report = needle()
    assert (code, "questions_sha256 was" in report["error"]) == (65, True)
    monkeypatch.setattr(corrected_mode, "SCORING_VERSION", 99)
    code, report = needle()
    assert (code, "scoring was" in report["error"]) == (65, True)


def test_another_spelling_of_the_corpus_is_the_same_run(
    oracle: Oracle, needle: Needle, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle.respond = copying(lambda lines, _: fenced(lines))
    assert needle()[0] == 0
    monkeypatch.chdir(corpus)
    assert needle("--corpus", ".")[0] == 0
    moved = shutil.copytree(corpus, tmp_path / "elsewhere" / corpus.name)
    assert needle("--corpus", str(moved))[0] == 0


def test_a_server_without_a_tokenizer_stays_below_its_lengths(oracle: Oracle, needle: Needle, tmp_path: Path) -> None:
    oracle.lacking = frozenset({"/tokenize"})
    oracle.respond = copying(lambda lines, _: fenced(lines))
    code, report = needle("--lengths", "4k,8k")
    assert (code, report["token_counts"], report["exact"]["rate"]) == (0, "estimated", 1.0)
    assert report["answered"] == report["items_planned"] >= 10
    for item in read_run(tmp_path / "needle.jsonl").items.values():
        assert item.data["prompt_tokens"] <= item.data["length"]


def test_text_and_markdown(oracle: Oracle, needle: Needle, tmp_path: Path) -> None:
    oracle.respond = copying(every_third_wrong(lambda lines: fenced([line.strip() for line in lines])))
    needle()
    run = read_run(tmp_path / "needle.jsonl")
    figures = summary.summarize(run)
    text = summary.text(figures)
    assert "8/12 = 66.7 % (95 %: 39.1 to 86.2); lines 66.7 %" in text
    assert "12/12 = 100.0 %" in text
    assert "names no corpus" in text
    assert "standard library" not in text
    report = summary.markdown(run, figures, tmp_path / "pictures")
    assert "(needle.svg)" in report
    assert (tmp_path / "pictures" / "needle.svg").read_text().startswith("<?xml")
    assert report.count("passes under strip") == 4
    assert sorted(summary.score(run).values()) == [0.0] * 4 + [1.0] * 8


def test_a_partial_run_says_so(oracle: Oracle, needle: Needle, tmp_path: Path) -> None:
    oracle.respond = copying(lambda lines, number: fenced(lines) if number < 5 else Reply(status=503))
    assert needle()[0] == 70  # stopped after errors in a row
    figures = summary.summarize(read_run(tmp_path / "needle.jsonl"))
    assert (figures["answered"], figures["exact"]["passed"]) == (5, 5)
    assert "5 of 12 items answered (partial)" in summary.text(figures)
    path = tmp_path / "needle.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    figures = summary.summarize(read_run(path))
    assert figures["exact"]["rate"] is None
    assert "nothing answered yet" in summary.text(figures) + summary.headline(figures)
    summary.markdown(read_run(path), figures, tmp_path)
