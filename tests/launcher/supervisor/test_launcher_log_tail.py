"""What of vLLM's log counts as the cause of an end: neither an old request's error, nor another start's lines."""

from pathlib import Path

import pytest

from step128_launcher.supervisor import vllm_log
from step128_launcher.supervisor.log_cap import cap_log
from step128_launcher.supervisor.preflight import prepare_state_dir
from step128_launcher.supervisor.vllm_log import RECENT_LINES, cause, read_tail

REFUSED = "ValueError: the prompt 'tell me' is too long"
ROOT = "torch.OutOfMemoryError: HIP out of memory"
SERVED = 'INFO:     127.0.0.1 - "POST /v1/completions HTTP/1.1" 200 OK'


def test_an_old_request_s_error_is_no_cause() -> None:
    lines = [REFUSED, *[SERVED] * RECENT_LINES]
    assert cause(lines) == [REFUSED]  # of a start, all of its log counts
    assert cause(lines, RECENT_LINES) == [SERVED] * 5
    assert cause([*lines, ROOT], RECENT_LINES) == [ROOT]


def test_a_cause_is_found_above_the_consequences_of_all_requests() -> None:
    dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."
    lines = [REFUSED, *[SERVED] * RECENT_LINES, ROOT, *[dead] * (2 * RECENT_LINES)]
    assert cause(lines, RECENT_LINES) == [ROOT]
    assert cause([REFUSED, *[SERVED] * 10 * RECENT_LINES, dead], RECENT_LINES) == [dead]


def test_a_log_that_was_just_cut_is_read_with_its_old_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(f"{REFUSED}\n{ROOT}\nRuntimeError: Exec")
    assert cap_log(log, 1)
    with log.open("a") as more:
        more.write("utor failed.\n")
    assert read_tail(log) == [REFUSED, ROOT, "RuntimeError: Executor failed."]
    monkeypatch.setattr(vllm_log, "_SHORT_BYTES", 5)
    assert read_tail(log) == ["utor failed."]


def test_an_old_part_stays_with_its_own_log(tmp_path: Path) -> None:
    state, log = tmp_path, tmp_path / "vllm.log"
    for number in (1, 2, 3):
        log.write_text(f"cut off {number}\n")
        if number != 3:
            cap_log(log, 1)
            log.write_text(f"rest {number}\n")
        prepare_state_dir(state, state / "reports", log)
        log.write_text("next\n")
        assert read_tail(log) == ["next"] and not (state / "vllm.log.old").exists()
        if number == 2:
            assert read_tail(state / "vllm.log.1") == ["cut off 2", "rest 2"]
            assert read_tail(state / "vllm.log.2") == ["rest 1"]
    assert read_tail(state / "vllm.log.1") == ["cut off 3"] and not (state / "vllm.log.1.old").exists()


def test_an_old_part_without_its_log_is_removed(tmp_path: Path) -> None:
    (tmp_path / "vllm.log.old").write_text("from whom?\n")
    prepare_state_dir(tmp_path, tmp_path / "reports", tmp_path / "vllm.log")
    assert not list(tmp_path.glob("vllm.log*"))
