"""``vision`` on the oracle: every right answer counts, every other does not, and blindness is found out."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from oracle import Oracle, Reply

from step128_evals.cli import main
from step128_evals.evaluation import summary_of
from step128_evals.runs import read_run
from step128_evals.vision.item import Question
from step128_evals.vision.pictures import draw_categories
from step128_evals.vision.questions import make_questions

OUT = "vision.jsonl"


def run(oracle: Oracle, *options: str) -> int:
    return main(["vision", "--base-url", oracle.url, "--out", OUT, *options])


def seen(body: dict[str, Any]) -> tuple[str, tuple[bytes, ...]]:
    """(text, pictures as PNG) of a request, from what went over the wire."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return content, ()
    urls = [part["image_url"]["url"] for part in content[:-1]]
    return content[-1]["text"], tuple(base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls)


def perfect(_path: str, body: dict[str, Any]) -> Reply:
    """A model that sees: it knows the answer by the pictures, and nothing without them."""
    asked = seen(body)
    found = (q.answer for q in make_questions(1) if (q.text, tuple(p.png for p in q.pictures)) == asked)
    return Reply(next(found, "I see no picture."))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[Question, ...]:
    """22 of the questions instead of all: 6 on colours, 6 sentences, 8 on two pictures, 2 codes."""
    wanted = ("two pictures", "sentence", "colour")
    some = [q for q in make_questions(1) if q.category in wanted or q.id in ("0.code-448-20px", "0.code-3024-36px")]
    monkeypatch.setattr("step128_evals.vision.command.make_questions", lambda _: tuple(some))
    return tuple(some)


def test_perfect_sight_and_blindness(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.respond = perfect
    assert run(oracle, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["asked"], report["share"]) == (82, 82, 1.0)
    assert report["interval"]["low"] == pytest.approx(0.9553, abs=1e-4)
    assert (report["blind"]["passed"], report["blind"]["asked"], report["blind"]["pairs"]) == (0, 82, 82)
    assert report["blind"]["p"] < 1e-20 and report["verdict"].startswith("it sees")
    assert {name: row["asked"] for name, row in report["categories"].items()} == {
        "bar chart": 12,
        "line chart": 9,
        "pie chart": 9,
        "code": 10,
        "table": 6,
        "sentence": 6,
        "counting": 8,
        "position": 8,
        "colour": 6,
        "two pictures": 8,
    }
    assert report["sizes"]["up to 728 pixels"]["asked"] + report["sizes"]["above 728 pixels"]["asked"] == 82
    assert not report["failures"] and not report["unsupported"]


def test_a_guesser_does_not_see(few: Any, oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.respond = lambda *_: Reply("red")
    assert run(oracle, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    reds = sum(question.answer == "red" for question in few)
    assert reds > 0 and report["passed"] == report["blind"]["passed"] == reds
    assert report["verdict"].startswith("no sign") and report["blind"]["p"] == 1.0
    assert report["failures"] == {"wrong": 22 - reds}


@pytest.mark.parametrize(
    ("shape", "passed", "kind"),
    [
        ("**{}**.", 22, None),
        ("I look.\n\nFinal answer: {}", 22, None),
        ("<think>Is it 7?</think>{}", 22, None),
        ("It is {}, I think", 0, "not alone"),
        ("", 0, "no answer"),
    ],
)
def test_forms_of_an_answer(
    few: Any, oracle: Oracle, capsys: pytest.CaptureFixture[str], shape: str, passed: int, kind: str | None
) -> None:
    oracle.respond = lambda path, body: Reply(shape.format(perfect(path, body).text))
    assert run(oracle, "--json", "--no-blind") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] == passed and report["blind"] is None
    assert report["failures"] == ({kind: 22} if kind else {})
    assert "cannot be said" in report["verdict"]


def test_cut_off_answers_are_named(few: Any, oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.respond = lambda *_: Reply("", reasoning="Let me see", finish_reason="length")
    assert run(oracle, "--json", "--no-blind", "--max-tokens", "5", "--reasoning-effort", "low") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == {"cut off": 22} and "22 of 22 answers were cut off" in report["verdict"]
    body = oracle.chats()[-1]
    assert body["max_tokens"] == 5 and body["reasoning_effort"] == "low" and body["temperature"] == 0


def test_no_images_is_unsupported(few: Any, oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    def text_only(_path: str, body: dict[str, Any]) -> Reply:
        return Reply("image input is not supported", status=500) if seen(body)[1] else Reply("ok")

    oracle.respond = text_only
    assert run(oracle, "--json") == 4
    out = capsys.readouterr()
    assert "has no images" in json.loads(out.out)["error"] and "image input is not supported" in out.err


def test_one_image_a_request_leaves_the_pairs_out(few: Any, oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    def single(path: str, body: dict[str, Any]) -> Reply:
        return Reply("At most 1 image", status=400) if len(seen(body)[1]) > 1 else perfect(path, body)

    oracle.respond = single
    assert run(oracle, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["asked"]) == (14, 14)
    assert len(report["unsupported"]) == 1 and "At most 1 image" in report["unsupported"][0]
    assert (report["blind"]["asked"], report["blind"]["pairs"]) == (22, 14)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_failure_leaves_no_pairs_out(
    few: Any, oracle: Oracle, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    once = [status]

    def respond(path: str, body: dict[str, Any]) -> Reply:
        return Reply("busy", status=once.pop()) if len(seen(body)[1]) > 1 and once else perfect(path, body)

    oracle.respond = respond
    assert run(oracle, "--json", "--no-blind") == 70
    assert "busy" in capsys.readouterr().err
    assert run(oracle, "--json", "--no-blind") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["asked"], report["unsupported"]) == (22, 22, [])


def test_errors_are_asked_again(few: Any, oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {q.text for q in make_questions(1) if q.category == "sentence"}

    def respond(path: str, body: dict[str, Any]) -> Reply:
        # The sentences differ in nothing but their pictures: every other one fails.
        if seen(body)[0] in broken and len(oracle.chats()) % 2:
            return Reply("out of memory", status=500)
        return perfect(path, body)

    oracle.respond = respond
    assert run(oracle, "--json", "--no-blind", "--concurrency", "1") == 70
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report["errors"] > 0 and report["passed"] == report["asked"] == 22 - report["errors"]
    assert "out of memory" in out.err and report["missing"] == report["errors"]
    oracle.respond = perfect
    before = len(oracle.chats())
    assert run(oracle, "--json", "--no-blind") == 0
    assert json.loads(capsys.readouterr().out)["passed"] == 22
    assert len(oracle.chats()) - before == report["errors"] + 3 + 1  # the probe's three, and the pair


def test_summary_of_half_a_run(few: Any, oracle: Oracle, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.respond = perfect
    assert run(oracle) == 0
    out = capsys.readouterr().out
    assert "22 of 22 answers are right" in out and "Rule:" in out
    path = tmp_path / OUT
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:16]))
    part = read_run(path)
    module = summary_of("vision")
    summary = module.summarize(part)
    assert summary["asked"] == 15 and summary["missing"] == 44 - 15
    assert "Not whole: 29 of 44" in module.text(summary)
    assert module.headline(summary).startswith("15 of 15 right (95 %: ")
    assert len(module.score(part)) == 15 and set(module.score(part).values()) == {1.0}
    empty = read_run(_only_manifest(path, lines))
    assert module.headline(module.summarize(empty)) == "nothing answered"
    assert "0 of 0" in module.text(module.summarize(empty))


def _only_manifest(path: Any, lines: list[bytes]) -> Any:
    path.write_bytes(lines[0])
    return path


def test_report_has_a_picture(few: Any, oracle: Oracle, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.respond = perfect
    assert run(oracle) == 0
    found = read_run(tmp_path / OUT)
    module = summary_of("vision")
    section = module.markdown(found, module.summarize(found), tmp_path)
    assert "(vision.svg)" in section and "| two pictures | 8 of 8 |" in section
    assert "<svg" in (tmp_path / "vision.svg").read_text()
    assert len(module.score(found)) == 22  # without the blind ones


def test_legend_when_the_first_category_was_not_asked_blind(tmp_path: Any) -> None:
    row = {"asked": 4, "share": 0.5, "interval": {"low": 0.2, "high": 0.8}}
    categories = {"a": row | {"blind": None}} | {name: row | {"blind": {"share": 0.25}} for name in ("b", "c")}
    draw_categories(categories, "m", tmp_path / "v.svg")
    assert (tmp_path / "v.svg").read_text().count("<!-- without -->") == 1


def test_items_can_be_scored_anew(few: Any, oracle: Oracle, tmp_path: Any) -> None:
    oracle.respond = perfect
    assert run(oracle, "--no-blind") == 0
    item = read_run(tmp_path / OUT).items["0.code-3024-36px"]
    assert item.data["said"] == item.data["expected"] == item.data["answer"]["text"]
    assert item.data["pictures"][0]["width"] == 3024 and len(item.data["pictures"][0]["sha256"]) == 64
    assert item.data["largest_side_pixels"] == 3024
