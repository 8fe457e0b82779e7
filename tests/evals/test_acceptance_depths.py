from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from step128_evals.acceptance.figures import figures
from step128_evals.cli import main
from step128_evals.runs import Item, Manifest, open_results

DOMAINS = ["code", "chat"]


def result(path: Path, depth: int | None, speeds: dict[str, float], spread: float = 0.05, **changes: Any) -> str:
    """A result file with a mean speed (tokens/s) for each domain; prompts differ alike at every depth."""
    settings = {"num_speculative_tokens": depth, "domains": DOMAINS, "prompts": 12, "sha256": {"code": "1"}}
    model, noise = changes.pop("model", "m"), random.Random(changes.pop("noise", depth))
    results = open_results(path, Manifest("acceptance", model, "http://h", settings | changes, {}))
    for domain in DOMAINS:
        for index in range(12):
            speed = speeds[domain] * (1 + 0.1 * index) * noise.uniform(1 - spread, 1 + spread)
            data = {"domain": domain, "tokens": 101, "first_token_seconds": 0.5, "seconds": 0.5 + 100 / speed}
            data |= {"drafts": 40 if depth else 0, "accepted": [30 - 10 * i for i in range(depth or 0)]}
            data |= {"counts_drafts": depth is not None}
            results.append(Item(f"{domain}-{index:02}", "measured", data=data))
    return str(path)


def advise(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["mtp-depth", *arguments, "--json"]) == code
    return dict(json.loads(capsys.readouterr().out))


def test_clear_win_and_clear_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {0: (20, 20), 1: (28, 19), 2: (34, 16), 3: (30, 12)}
    files = [
        result(tmp_path / f"{depth}.jsonl", depth, {"code": code, "chat": chat})
        for depth, (code, chat) in reversed(speeds.items())
    ]
    advice = advise(capsys, *files)
    assert advice["measured_depths"] == [0, 1, 2, 3] and advice["missing_depths"] == []
    code, chat = advice["domains"]["code"], advice["domains"]["chat"]
    assert code["advice"] == 2 and code["reason"] == "faster than depth 0, 1, 3; no interval includes 1"
    assert code["depths"]["2"]["ratio"] == pytest.approx(1.7, rel=0.03)
    assert code["depths"]["2"]["ratio_interval"]["low"] > 1.6 and code["depths"]["0"]["ratio"] == 1
    assert code["depths"]["3"]["mean_accepted_length"] == pytest.approx(1 + 60 / 40)
    # Twelve prompts say that 19 tokens/s is less than 20: MTP only costs here.
    assert chat["advice"] == 0 and chat["depths"]["3"]["ratio_interval"]["high"] < 0.65
    assert advice["all"]["prompts"] == 24


def test_a_tie_prefers_the_smaller_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"code": 20.0, "chat": 20.0}
    files = [result(tmp_path / f"{depth}.jsonl", depth, same, spread=0.2) for depth in (0, 1)]
    advice = advise(capsys, *files)
    for group in (*advice["domains"].values(), advice["all"]):
        assert group["advice"] == 0
        assert group["depths"]["1"]["ratio"] < 1  # so this noise has it
        assert group["reason"] == "depth 1 cannot be told apart from it, but drafts more"
    files = [result(tmp_path / f"{depth}-swapped.jsonl", 1 - depth, same, noise=depth, spread=0.2) for depth in (0, 1)]
    advice = advise(capsys, *files)
    for group in (*advice["domains"].values(), advice["all"]):
        assert group["advice"] == 0
        assert "times as fast" in group["reason"] and "cannot be told apart from 1" in group["reason"]
    assert advice["missing_depths"] == [2, 3]
    assert "step128 serve MODEL --num-speculative-tokens N" in advice["how_to_measure"]


def test_a_depth_that_was_not_told_is_what_the_prompts_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"code": 20.0, "chat": 20.0}
    files = [result(tmp_path / f"{depth}.jsonl", depth, speeds) for depth in (0, 3)]
    for file in files:
        told = Path(file).read_text()
        hidden = told.replace('"num_speculative_tokens": 3', '"num_speculative_tokens": null')
        hidden = hidden.replace('"num_speculative_tokens": 0', '"num_speculative_tokens": null')
        assert hidden != told
        Path(file).write_text(hidden)
    assert advise(capsys, *files)["measured_depths"] == [0, 3]


def test_answers_without_a_time_after_the_first_token_have_no_speed() -> None:
    shown = {"tokens": 11, "first_token_seconds": 1.0, "seconds": 3.0, "drafts": 0, "accepted": []}
    hidden = shown | {"first_token_seconds": 3.0}
    one = shown | {"tokens": 1}
    items = [Item(str(number), "measured", data=data) for number, data in enumerate((shown, hidden, one))]
    found = figures(items, 0)
    assert found["decode_tokens_per_second"] == 5 and found["tokens_per_second"] == pytest.approx(23 / 9)
    assert figures(items[1:], 0)["decode_tokens_per_second"] is None


def test_text_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [result(tmp_path / f"{d}.jsonl", d, {"code": 20.0 + 10 * d, "chat": 20.0}) for d in (0, 3)]
    picture = tmp_path / "pictures" / "depths.svg"
    assert main(["mtp-depth", *files, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "code: depth 3: faster than depth 0; no interval includes 1" in out
    assert "Not measured: depth 1, 2." in out and "times depth 0" in out
    assert picture.stat().st_size > 5000
    (tmp_path / "file").write_text("")
    assert main(["mtp-depth", *files, "--picture", str(tmp_path / "file" / "x.svg")]) == 73
    with pytest.raises(SystemExit):
        main(["mtp-depth", *files, "--picture", "x.docx"])


def test_prompts_that_one_depth_lacks_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [result(tmp_path / f"{d}.jsonl", d, {"code": 20.0, "chat": 30.0}) for d in (0, 1)]
    lines = Path(files[1]).read_text().splitlines()
    Path(files[1]).write_text(
        "\n".join(line for line in lines if '"chat-' not in line and "code-03" not in line) + "\n"
    )
    advice = advise(capsys, *files)
    assert advice["domains"]["code"]["prompts"] == 11
    assert advice["domains"]["chat"]["advice"] is None
    assert main(["mtp-depth", *files]) == 0
    assert "chat: no advice: no prompt was measured at all depths" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"depth": 0}, "were both measured at depth 0"),
        ({"depth": 1, "model": "other"}, "they are of the models other and m"),
        ({"depth": 1, "prompts": 5, "sha256": {"code": "2"}}, "their settings differ in prompts, sha256"),
        ({"depth": None}, "did not tell how many tokens it drafts"),
    ],
)
def test_what_does_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], second: dict[str, Any], message: str
) -> None:
    speeds = {"code": 20.0, "chat": 20.0}
    files = [result(tmp_path / "a.jsonl", 0, speeds), result(tmp_path / "b.jsonl", speeds=speeds, **second)]
    assert message in advise(capsys, *files, code=65)["error"]


def test_one_depth_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = result(tmp_path / "a.jsonl", 3, {"code": 20.0, "chat": 20.0})
    error = advise(capsys, path, code=65)["error"]
    assert "depth 3 alone compares with nothing. Not measured: depth 0, 1, 2." in error
    assert advise(capsys, str(tmp_path / "none.jsonl"), code=66)
    open_results(tmp_path / "n.jsonl", Manifest("needle", "m", "http://h", {}, {}))
    assert "results of acceptance are needed" in advise(capsys, str(tmp_path / "n.jsonl"), code=65)["error"]
