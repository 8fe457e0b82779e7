"""Every command against every bad endpoint: a sentence, the documented exit code, no traceback, what was there kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bad_servers import SERVERS, bad_server
from counting import Counting
from needle_texts import write_corpus
from oracle import Oracle, Reply, words

from step128_evals.cli import main
from step128_evals.runs import read_run

Capture = pytest.CaptureFixture[str]
OUT = "run.jsonl"
TEXT = "One line of words, and then another one.\n" * 40

COMMANDS = {
    "probe": [],
    "smoke": [],
    "ppl": ["--text", "text.txt", "--context-tokens", "64", "--max-chunks", "8"],
    "needle": ["--corpus", "corpus", "--lengths", "2k", "--depths", "0,100", "--items", "14"],
    "tools": ["--scenarios", "single-*", "--depth-tokens", "0", "--variants", "plain,streamed", "--concurrency", "1"],
    "acceptance": ["--domains", "prose", "--prompts", "8", "--max-tokens", "4"],
    "depth": ["--depths", "128", "--concurrencies", "1", "--repeats", "10", "--output-tokens", "4"],
    "soak": ["--minutes", "0.02", "--canary-seconds", "0.3", "--sample-seconds", "0.1", "--concurrency", "2"],
    "vision": ["--no-blind", "--max-tokens", "4"],
    "reasoning": ["--problems", "4", "--max-tokens", "64"],
}
KEEPS_RESULTS = [name for name in COMMANDS if name not in ("probe", "smoke")]


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' input files in the working folder, and a short vision set."""
    from step128_evals.vision.questions import make_questions

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr("step128_evals.metrics._SETTLE_SECONDS", 0.01)
    monkeypatch.setattr("step128_evals.soak.session._STEP_SECONDS", 0.02)
    # The oracle lives in this process: what it prints when a client hangs up on it is no output of the command.
    monkeypatch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
    (tmp_path / "text.txt").write_text(TEXT)
    write_corpus(tmp_path / "corpus", files=12)
    few = tuple(q for q in make_questions(1) if q.category in ("sentence", "colour", "table"))
    monkeypatch.setattr("step128_evals.vision.command.make_questions", lambda _: few)


def run(command: str, url: str, capsys: Capture, *options: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON on standard output, standard error)."""
    out = ["--out", OUT] if command in KEEPS_RESULTS else []
    capsys.readouterr()
    code = main([command, "--base-url", url, "--json", *COMMANDS[command], *out, *options])
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["exit_code"] == code and "Traceback" not in said.err
    return code, report, said.err


def one_sentence(code: int, report: dict[str, Any], said: str) -> str:
    """The error of a command that ended by one: said once, on one line."""
    last = said.strip().splitlines()[-1]
    assert last == f"step128-eval: {report['error']}" and len(report["error"]) < 700
    assert said.count("step128-eval:") == 1
    return str(report["error"])


NO_ENDPOINT = {
    "html": (70, "does not follow the API"),
    "html 404": (4, "status 404"),
    "redirect": (70, "status 307"),
    "redirect to itself": (70, "status 302"),
    "401": (5, "refuses the API key"),
    "403 without a body": (5, "refuses the API key"),
    "429": (70, "status 429: slow down"),
    "500": (70, "status 500"),
    "503": (70, "status 503"),
    "no json": (70, "does not follow the API"),
    "a list": (70, "does not follow the API"),
    "null": (70, "does not follow the API"),
    "no models": (70, "it serves nothing"),
    "strange models": (70, "does not follow the API"),
    "cut": (69, "no answer"),
    "no http": (69, "no answer"),
    "nothing": (69, "no answer"),
    "reset": (69, "no answer"),
    "silent": (69, "no answer"),
}


@pytest.mark.parametrize("kind", SERVERS)
def test_what_is_no_endpoint(kind: str, capsys: Capture) -> None:
    with bad_server(SERVERS[kind]) as url:
        code, report, said = run("reasoning", url, capsys, "--timeout-seconds", "1")
    expected, words_of_it = NO_ENDPOINT[kind]
    assert (code, words_of_it in one_sentence(code, report, said)) == (expected, True), said
    assert not Path(OUT).exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["html", "401", "reset"])
def test_each_command_without_an_endpoint(command: str, kind: str, capsys: Capture) -> None:
    with bad_server(SERVERS[kind]) as url:
        code, report, said = run(command, url, capsys)
    assert code == NO_ENDPOINT[kind][0] and NO_ENDPOINT[kind][1] in one_sentence(code, report, said)


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_port(command: str, capsys: Capture) -> None:
    with bad_server(b"") as url:
        pass
    code, report, said = run(command, url, capsys)
    assert code == 69 and f"no answer from {url}" in one_sentence(code, report, said)


@dataclass
class Breaking:
    """A good server until ``good`` items are in the result file; then ``fault`` answers, until it is taken away."""

    oracle: Oracle
    good: int = 2
    fault: Callable[[], Reply] | None = None
    faults: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        Counting(self.oracle, answer=self.answer)
        counted = self.oracle.respond
        self.oracle.respond = lambda path, body: counted(path, body) if path.startswith("/v1") else None

    def answer(self, path: str, body: dict[str, Any]) -> Reply | None:
        if self.fault and Path(OUT).exists() and len(Path(OUT).read_bytes().splitlines()) > self.good:
            self.faults += 1
            return self.fault()
        if "prompt_logprobs" in body:
            tokens = body["prompt"] if isinstance(body["prompt"], list) else words(body["prompt"])
            rows = [{str(token): {"logprob": -0.5}} for token in tokens]
            return Reply(body={"choices": [{"text": "x", "prompt_logprobs": [None, *rows[1:]]}]})
        # Its count of prompt tokens would say that it leaves the tools out.
        return Reply("No.", usage=False) if "tools" in body else None


FAULTS: dict[str, tuple[Callable[[], Reply], int, str]] = {
    "401": (lambda: Reply("bad key", status=401), 5, "refuses the API key"),
    "404": (lambda: Reply("no such model", status=404), 70, "no such model"),
    "429": (lambda: Reply("slow down", status=429), 70, "slow down"),
    "500": (lambda: Reply("out of memory", status=500), 70, "out of memory"),
    "html": (lambda: Reply(raw="<html>"), 70, ""),
    "half an answer": (lambda: Reply("a b c d e f", cut_after=0), 69, "no answer from"),
    "stream cut": (lambda: Reply("a b c d e f", cut_after=1), 69, "no answer from"),
    "no choices": (lambda: Reply(raw='{"choices": [], "usage": {}}'), 70, ""),
    "null": (lambda: Reply(raw="null"), 70, ""),
    "too slow": (lambda: Reply("late", delay_seconds=1.5), 69, "no answer from"),
}


def breaks_and_resumes(command: str, kind: str, oracle: Oracle, capsys: Capture) -> None:
    """Run into a fault halfway, look at what was kept, take the fault away, and run the same command again."""
    fault, expected, reason = FAULTS[kind]
    server = Breaking(oracle, fault=fault)
    code, report, said = run(command, oracle.url, capsys, "--timeout-seconds", "1")
    assert server.faults, f"{command} asked nothing after two items"
    assert code == expected and reason in said + str(report), (code, said[-500:], report)
    kept = {id: item for id, item in read_run(Path(OUT)).items.items() if item.final}
    assert len(kept) >= server.good
    server.fault = None
    code, report, said = run(command, oracle.url, capsys)
    assert code == 0, said
    whole = read_run(Path(OUT))
    assert whole.missing == 0 and not whole.with_status("error")
    assert kept.items() <= whole.items.items(), "a finished item was asked again"


@pytest.mark.parametrize("kind", FAULTS)
def test_a_server_that_breaks_halfway(kind: str, oracle: Oracle, capsys: Capture) -> None:
    breaks_and_resumes("reasoning", kind, oracle, capsys)


@pytest.mark.proof
@pytest.mark.parametrize("command", [name for name in KEEPS_RESULTS if name not in ("reasoning", "soak")])
@pytest.mark.parametrize("kind", FAULTS)
def test_each_command_at_each_fault(command: str, kind: str, oracle: Oracle, capsys: Capture) -> None:
    breaks_and_resumes(command, kind, oracle, capsys)


@pytest.mark.parametrize("kind", ["401", "404", "500", "stream cut"])
def test_a_soak_counts_what_breaks(kind: str, oracle: Oracle, capsys: Capture) -> None:
    """Errors are what a soak is for: they are outcomes, and its verdict is that the server failed."""
    fault, _, reason = FAULTS[kind]
    server = Breaking(oracle, fault=fault)
    code, report, said = run("soak", oracle.url, capsys, "--timeout-seconds", "1", "--kinds", "chat,whole")
    assert server.faults and code == 70, said
    assert report["verdicts"]["errors"]["outcome"] == "failed"
    assert any(reason in item.why for item in read_run(Path(OUT)).items.values()) or reason in said
