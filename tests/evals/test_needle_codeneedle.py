"""`--mode codeneedle` on our own files: its rules by hand-counted examples; the proof is `test_needle_original`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from needle_texts import JAVASCRIPT, RUNNER, python_function, write_clone
from oracle import KEY, Oracle, Reply

from step128_evals.cli import main
from step128_evals.errors import BadInputError, EvalError, InputNotFoundError
from step128_evals.needle import summary
from step128_evals.needle.codeneedle.clone import commit_of, read_corpus, read_template
from step128_evals.needle.codeneedle.scoring import count_lines, relaxed, strict
from step128_evals.needle.codeneedle.targets import Target, draw, find_targets
from step128_evals.runs import read_run

BODY = [f"    line {number}" if number % 5 != 4 else "" for number in range(1, 71)]
ASKED, BONUS = BODY[:20], BODY[20:60]
TEXT = "\n".join(ASKED)


def test_javascript_functions_are_named_by_themselves_or_their_place() -> None:
    found = find_targets(JAVASCRIPT, "js", "script.js")
    assert [target.name for target in found] == ["plain", "arrow", "made", "entry", "named", "method"]
    assert [target.start_line for target in found] == [3, 27, 51, 75, 98, 123]
    assert all(len(target.body) == 22 for target in found)
    assert found[0].body[:5] == (*(f"    value += {n};" for n in range(1, 5)), "")


def test_python_functions_begin_at_their_first_statement() -> None:
    text = python_function("first", 20) + python_function("short", 12) + python_function("first", 30)
    found = find_targets(text, "py", "a.py")
    assert [(target.name, target.start_line, len(target.body)) for target in found] == [("first", 4, 23)]
    assert found[0].asked[0] == '    """Add to first."""'


@pytest.mark.parametrize(("text", "language"), [("def (", "py"), ("function (", "js"), ("a\0b", "py")])
def test_a_file_that_cannot_be_parsed(text: str, language: str) -> None:
    with pytest.raises(BadInputError, match=r"a\.txt cannot be parsed"):
        find_targets(text, language, "a.txt")


def test_the_draw_takes_one_of_each_stretch() -> None:
    targets = [Target(f"f{number}", 10 * number + 1, tuple(BODY)) for number in range(64)]
    drawn = draw(targets, 640, 16, 42)
    assert [target.start_line // 40 for target in drawn] == list(range(16))
    assert drawn == draw(targets[::-1], 640, 16, 42) != draw(targets, 640, 16, 43)
    assert draw(targets[:9], 640, 16, 42) == targets[:9]
    crowded = draw(targets, 64_000, 16, 42)  # all in the first stretch: one drawn there, the rest shuffled
    assert len({target.name for target in crowded}) == 16


@pytest.mark.parametrize(
    ("answer", "matched", "hallucinated", "bonus", "matched_relaxed"),
    [
        (TEXT, 20, 0, 0, 20),
        (TEXT + "\n", 20, 0, 0, 20),
        ("\n".join(line + "  " for line in ASKED), 20, 0, 0, 20),
        ("\n".join(BODY), 20, 8, 40, 20),  # lines 61 to 70 are beyond the bonus, of which two are blank
        (f"```\n{TEXT}\n```", 20, 0, 0, 20),
        (f"Here:\n```js\n{TEXT}\n```\nDone.", 20, 0, 0, 20),
        (f"```js\n{TEXT}", 20, 0, 0, 20),
        ("\n".join(line.strip() for line in ASKED), 4, 16, 0, 20),
        ("\n".join(ASKED[:8]), 8, 0, 0, 8),
        ("\n".join(ASKED[:7]), 7, 0, 0, 7),
        ("<think>\nhm\n</think>\n" + TEXT, 20, 3, 0, 20),
        ("", 0, 0, 0, 0),
        ("what?", 0, 1, 0, 0),
    ],
)
def test_scores(answer: str, matched: int, hallucinated: int, bonus: int, matched_relaxed: int) -> None:
    counts = count_lines(ASKED, BONUS, answer, strict)
    assert (counts.matched, counts.asked, counts.hallucinated, counts.bonus) == (matched, 20, hallucinated, bonus)
    assert counts.passed == (matched >= 8)
    assert count_lines(ASKED, BONUS, answer, relaxed).matched == matched_relaxed


def test_the_prompt_is_the_clones(tmp_path: Path) -> None:
    clone = write_clone(tmp_path)
    corpus, template = read_corpus(clone, "script"), read_template(clone)
    prompt = template.fill(corpus.source, "js", "plain", 20, no_think=True)
    assert prompt == (
        f"// ====== {tmp_path}/fixtures/script.js ======\n{JAVASCRIPT}\n"
        "Copy 20 lines of `plain`, after the brace of plain, not `the head of plain`. /no_think"
    )
    assert (
        template.fill("", "py", "f", 20, no_think=False) == "Copy 20 lines of `f`, after def f, not `f and its colon`."
    )
    assert commit_of(clone) is None


@pytest.mark.parametrize(
    "change",
    [
        ("{anchor_phrase}", "{anchor}"),
        ("{n}", "{n.real}"),
        ("{name}`", "{name!r}`{0}"),
        ("PROMPT_TEMPLATE", "PROMPT"),
        ('"py": "after def {name}"', '"rb": ""'),
        ('" /no_think"', "make()"),
        ('" /no_think"', "7"),
        ("PROMPT_TEMPLATE = (", "PROMPT_TEMPLATE = (("),
        ("{file_contents}", "{file_contents"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    clone = write_clone(tmp_path)
    assert change[0] in RUNNER
    (clone / "bench" / "runner.py").write_text(RUNNER.replace(*change))
    with pytest.raises(BadInputError, match=r"runner\.py"):
        read_template(clone)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("nothing", InputNotFoundError, "there are: both, broken, module, script"),
        ("both", BadInputError, "must name one JavaScript or Python file"),
        ("broken", BadInputError, "no corpus configuration"),
    ],
)
def test_corpora_that_cannot_be_used(tmp_path: Path, name: str, kind: type[EvalError], why: str) -> None:
    with pytest.raises(kind, match=why):
        read_corpus(write_clone(tmp_path), name)


class Run:
    def __init__(self, oracle: Oracle, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.oracle, self.folder, self.capsys = oracle, folder, capsys
        self.out = folder / "out.jsonl"
        self.clone = write_clone(folder / "clone")

    def __call__(self, *options: str) -> tuple[int, dict[str, Any]]:
        common = ["--mode", "codeneedle", "--base-url", self.oracle.url, "--out", str(self.out), "--json"]
        self.capsys.readouterr()
        return main(["needle", *common, *options]), json.loads(self.capsys.readouterr().out)

    def of_clone(self, *options: str) -> tuple[int, dict[str, Any]]:
        return self("--codeneedle", str(self.clone), "--codeneedle-corpus", "module", *options)


@pytest.fixture
def run(oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return Run(oracle, tmp_path, capsys)


def job_lines(body: dict[str, Any]) -> list[str] | None:
    """The first 20 body lines of the function that a prompt asks about."""
    content = str(body.get("messages", [{}])[0].get("content"))
    if "Copy 20 lines" not in content:
        return None
    name = content.rsplit("lines of `", 1)[1].split("`")[0]
    return python_function(name, 20).split("\n")[3:23]


def test_without_a_clone_the_command_says_how_to_get_one(run: Run) -> None:
    code, report = run()
    assert code == 65
    assert "git clone https://github.com/alexziskind1/codeneedle" in report["error"]
    code, report = run("--codeneedle", str(run.folder))
    assert code == 66
    assert "git clone https://github.com/alexziskind1/codeneedle" in report["error"]


def test_a_run_has_the_benchmarks_figures(run: Run) -> None:
    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        lines = job_lines(body)
        if lines is None:
            return None
        even = int(lines[0].split("job_")[1][:2]) % 2 == 0
        return Reply("\n".join(lines if even else [line.strip() for line in lines]))

    run.oracle.respond = respond
    code, report = run.of_clone()
    assert code == 0
    even = sum(int(name[-2:]) % 2 == 0 for name in read_run(run.out).items)
    blanks = 2  # the only lines without indentation to lose
    assert (report["answered"], report["strict"]["passed"], report["relaxed"]["passed"]) == (16, even, 16)
    assert (report["strict"]["lines_matched"], report["strict"]["lines_asked"]) == (
        20 * even + blanks * (16 - even),
        320,
    )
    assert report["strict"]["hallucinated"] == 18 * (16 - even)
    assert report["relaxed"]["lines_matched"] == 320
    bodies = [body for body in run.oracle.chats() if job_lines(body)]
    assert {(body["temperature"], body["max_tokens"], body["stream"]) for body in bodies} == {(0, 6000, False)}
    assert all(body["messages"][0]["content"].endswith(" /no_think") for body in bodies)
    figures = summary.summarize(read_run(run.out))
    assert f"strict: passed {even}/16" in summary.text(figures)
    assert "| `job_00` |" in summary.markdown(read_run(run.out), figures, run.folder)


def test_think_leaves_the_suffix_out_and_is_another_run(run: Run) -> None:
    run.oracle.respond = lambda path, body: Reply("x") if job_lines(body) else None
    assert run.of_clone("--think")[0] == 0
    assert not any(str(body["messages"]).count("/no_think") for body in run.oracle.chats())
    code, report = run.of_clone()
    assert code == 65
    assert "no_think was False and is now True" in report["error"]


@pytest.mark.parametrize(
    "bad", [Reply(status=500), Reply("def", cut_after=1), Reply("  ", reasoning="hm"), Reply(raw="{")]
)
def test_errors_are_no_failures_and_are_asked_again(run: Run, bad: Reply) -> None:
    run.oracle.respond = lambda path, body: (
        None
        if (lines := job_lines(body)) is None
        else bad
        if lines[0][-6:-4] in ("04", "13")
        else Reply("\n".join(lines))
    )
    code, report = run.of_clone("--concurrency", "1")
    assert code == 70
    assert report["strict"]["passed"] == report["answered"] == 16 - report["request_errors"] < 16
    run.oracle.respond = lambda path, body: Reply("\n".join(lines)) if (lines := job_lines(body)) else None
    kept = len(read_run(run.out).with_status("passed"))
    before = len([body for body in run.oracle.chats() if job_lines(body)])
    code, report = run.of_clone()
    assert (code, report["strict"]["lines_matched"]) == (0, 320)
    assert len([body for body in run.oracle.chats() if job_lines(body)]) == before + 16 - kept


def test_a_corpus_that_does_not_fit_is_said_before_anything_is_asked(run: Run) -> None:
    run.oracle.context_tokens = 7000
    code, report = run.of_clone()
    assert code == 4
    assert "need 6" in report["error"] or "is served with 7000" in report["error"]
    assert not any(job_lines(body) for body in run.oracle.chats())
