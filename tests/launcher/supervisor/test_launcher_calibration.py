"""Measurements of earlier starts: stored for each machine, found again by their exact settings."""

import argparse
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.commands.calibrate import calibration_document, run_calibrate, settings_of
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import AMD, Gpu, Hardware
from step128_launcher.planning.calibration import (
    Calibration,
    Measurement,
    Settings,
    calibration_folder,
    load_calibration,
    machine_key,
    model_fingerprint,
    save,
)

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py
SETTINGS = Settings("0123456789ab", 4, 3, 16, 2048, True, "TRITON_ATTN", "fp8", False, "bfloat16", False)
MEASURED = Measurement(SETTINGS, 28 * 2**30, 2**30, None, 0, "2026-01-02", "0.32.0", "/log")
LOG = (
    "(APIServer pid=6) INFO 11-23 16:53:34 [api_utils.py:347]  version 0.32.0\n"
    "(Worker pid=8) INFO 11-23 16:30:00 [m.py:1] Model loading took 1.50 GiB memory and 12.5 seconds\n"
)


@pytest.fixture
def cpu(make_machine: Callable[..., Hardware]) -> Hardware:
    return make_machine()


def r9700(address: str) -> Gpu:
    return Gpu(AMD, address, "1002:7551", "R9700", "gfx1201", 64, False, vram_total_bytes=32 * 2**30)


def test_stored_and_found_by_exact_settings(cpu: Hardware, tmp_path: Path) -> None:
    assert load_calibration(cpu, tmp_path) == Calibration(())
    path = save(MEASURED, machine_key(cpu), tmp_path)
    assert path.stat().st_mode & 0o077 == 0
    found = load_calibration(cpu, tmp_path).measurements
    assert found == (MEASURED,) and found[0].settings == SETTINGS


def test_the_newest_of_the_same_settings_stays(cpu: Hardware, tmp_path: Path) -> None:
    other = replace(MEASURED, settings=replace(SETTINGS, max_num_seqs=8, attention_backend=None))
    newer = replace(MEASURED, weights_bytes=5, date="2026-02-03")
    for measurement in (MEASURED, other, newer):
        save(measurement, machine_key(cpu), tmp_path)
    assert load_calibration(cpu, tmp_path).measurements == (other, newer)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: "{",
        lambda document: "[" * 100_000,
        lambda document: json.dumps(document | {"schema": 1}),
        lambda document: json.dumps({"schema": 2}),
        lambda document: json.dumps(document | {"measurements": [document["measurements"][0] | {"graph_bytes": -1}]}),
        lambda document: json.dumps(document | {"measurements": [document["measurements"][0] | {"settings": {}}]}),
        lambda document: json.dumps([]),
    ],
)
def test_a_broken_file_is_a_warning_and_is_kept_aside(
    spoil: Callable[[dict[str, Any]], str], cpu: Hardware, tmp_path: Path
) -> None:
    path = save(MEASURED, machine_key(cpu), tmp_path)
    path.write_text(spoil(json.loads(path.read_text())))
    assert load_calibration(cpu, tmp_path).measurements == ()
    warning = load_calibration(cpu, tmp_path).warning
    assert path.name in warning and "Delete it" in warning
    save(MEASURED, machine_key(cpu), tmp_path)
    assert load_calibration(cpu, tmp_path).measurements == (MEASURED,) and path.with_suffix(".broken").exists()


def test_the_machine_s_key(cpu: Hardware) -> None:
    quad = replace(cpu, gpus=tuple(r9700(f"0000:{bus}:00.0") for bus in ("03", "23", "43", "83")))
    moved = replace(quad, gpus=tuple(r9700(f"0000:{bus}:00.0") for bus in ("01", "02", "03", "04")))
    assert machine_key(quad).startswith("4x-gfx1201-") and machine_key(quad) == machine_key(moved)
    fewer = replace(quad, gpus=quad.gpus[:2])
    hidden = replace(quad, gpus=(*quad.gpus[:2], *(replace(gpu, visible=False) for gpu in quad.gpus[2:])))
    larger = replace(quad, gpus=tuple(replace(gpu, vram_total_bytes=48 * 2**30) for gpu in quad.gpus))
    assert machine_key(fewer) == machine_key(hidden)
    assert len({machine_key(machine) for machine in (quad, fewer, larger, cpu)}) == 4
    assert machine_key(cpu) == machine_key(replace(cpu, memory_available_bytes=1))  # what is free now is no part of it


def test_the_folder_follows_the_xdg_rule() -> None:
    assert calibration_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/step128/calibration")
    assert calibration_folder({}) == Path.home() / ".local/share/step128/calibration"


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"log": None, "plan": None, "metrics": None, "json": True} | given))


@pytest.fixture
def finished(bench: Bench, cpu: Hardware, tmp_path: Path) -> Path:
    """The state folder of a start that came to its end."""
    state = tmp_path / "state"
    state.mkdir()
    (state / "vllm.log").write_text(LOG)
    document = {"calibration": calibration_document(bench.plan, bench.job.footprint.path, cpu), "reality": {}}
    (state / "plan.json").write_text(json.dumps(document))
    return state


def test_calibrate_stores_what_the_next_plan_finds(
    bench: Bench, cpu: Hardware, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "calibration"
    assert run_calibrate(arguments(), finished, folder) is ExitCode.OK
    printed = json.loads(capsys.readouterr().out)
    row = next(row for row in printed["rows"] if row["item"] == "weights")
    assert row["measured"] == 1.5 * 2**30 and row["difference"] == row["measured"] - row["planned"]
    assert printed["stored"] == str(folder / f"{machine_key(cpu)}.json")
    wanted = settings_of(bench.plan, bench.job.footprint.path)
    found = next((one for one in load_calibration(cpu, folder).measurements if one.settings == wanted), None)
    assert found is not None and found.weights_bytes == 1.5 * 2**30 and found.graph_bytes is None
    assert found.vllm_version == "0.32.0" and found.source == str(finished / "vllm.log")


def test_the_kept_figures_serve_when_the_log_was_cut(finished: Path, tmp_path: Path) -> None:
    (finished / "vllm.log").write_text("only requests since\n")
    plan = json.loads((finished / "plan.json").read_text())
    (finished / "plan.json").write_text(json.dumps(plan | {"reality": {"weights_bytes": 7, "graph_bytes": None}}))
    run_calibrate(arguments(), finished, tmp_path / "c")
    document = json.loads(next((tmp_path / "c").iterdir()).read_text())
    assert document["measurements"][0]["weights_bytes"] == 7


def test_for_people(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = tmp_path / "metrics.txt"
    metrics.write_text('vllm:cache_config_info{num_gpu_blocks="12"} 1.0\n')
    run_calibrate(arguments(json=False, metrics=str(metrics)), finished, tmp_path / "c")
    printed = capsys.readouterr().out
    assert "Stored in" in printed and "1.50 GiB" in printed and "KV blocks" in printed


def test_nothing_is_stored_where_nothing_was_measured(finished: Path, tmp_path: Path) -> None:
    (finished / "vllm.log").write_text(
        "CPU KV cache size: 131,173 tokens, Maximum concurrency for 16,384 tokens per request: 8x"
    )
    assert run_calibrate(arguments(), finished, tmp_path / "c") is ExitCode.OK
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("vllm.log", None, ExitCode.INPUT_NOT_FOUND, "vllm.log cannot be read"),
        ("plan.json", None, ExitCode.INPUT_NOT_FOUND, "plan.json cannot be read"),
        ("plan.json", "{", ExitCode.BAD_CHECKPOINT, "not valid JSON"),
        ("plan.json", "[]", ExitCode.BAD_CHECKPOINT, "holds no plan"),
        ("plan.json", "{}", ExitCode.BAD_CHECKPOINT, "holds no plan of this version"),
        ("plan.json", "[" * 100_000, ExitCode.BAD_CHECKPOINT, "not valid JSON"),
        ("plan.json", '{"calibration": {"planned": []}}', ExitCode.BAD_CHECKPOINT, "holds no plan of this version"),
        ("vllm.log", "it died\n", ExitCode.BAD_CHECKPOINT, "no finished start"),
    ],
)
def test_what_cannot_be_used_is_said(
    name: str, content: str | None, code: ExitCode, says: str, finished: Path, tmp_path: Path
) -> None:
    if content is None:
        (finished / name).unlink()
    else:
        (finished / name).write_text(content)
    with pytest.raises(LauncherError, match=says) as caught:
        run_calibrate(arguments(), finished, tmp_path / "c")
    assert caught.value.exit_code == code and not (tmp_path / "c").exists()


def test_a_start_that_did_not_finish_replaces_nothing(finished: Path, tmp_path: Path) -> None:
    """Its log reports the weights, and nothing that comes after them."""
    folder, plan, log = tmp_path / "c", finished / "plan.json", finished / "vllm.log"
    document = json.loads(plan.read_text())
    plan.write_text(json.dumps(document | {"reality": {"weights_bytes": 7, "graph_bytes": 8}}))
    run_calibrate(arguments(), finished, folder)
    stored = next(folder.iterdir()).read_text()
    plan.write_text(json.dumps({"calibration": document["calibration"]}))
    for given in ({}, {"log": log, "plan": plan}):
        with pytest.raises(LauncherError, match="no finished start") as caught:
            run_calibrate(arguments(**given), finished, folder)
        assert caught.value.exit_code is ExitCode.BAD_CHECKPOINT and "--log FILE" in caught.value.hint
    assert next(folder.iterdir()).read_text() == stored
    log.write_text(f"{LOG}(APIServer pid=6) INFO:     Application startup complete.\n")
    assert run_calibrate(arguments(log=log, plan=plan), finished, folder) is ExitCode.OK


def test_metrics_of_this_machine_are_asked_with_a_key(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    (finished / "api_key").write_text("the-key\n")
    with socket.create_server(("0.0.0.0", 0)) as server:

        def answer() -> None:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    asked.append(connection.recv(4096))
                    connection.sendall(b'HTTP/1.0 200 OK\r\n\r\nvllm:cache_config_info{num_gpu_blocks="12"} 1.0\n')

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        # The last stands for another machine: it is not told the API key.
        for url in (f"http://127.0.0.1:{port}/metrics", f"http://127.0.0.2:{port}/metrics"):
            assert run_calibrate(arguments(metrics=url), finished, tmp_path / "c") is ExitCode.OK
        monkeypatch.setenv("STEP128_METRICS_TOKEN", "the-token")
        assert run_calibrate(arguments(metrics=url), finished, tmp_path / "c") is ExitCode.OK
    assert b"Authorization: Bearer the-key\r\n" in asked[0]
    assert b"Authorization" not in asked[1]
    assert b"Authorization: Bearer the-token\r\n" in asked[2]


def test_metrics_from_what_speaks_no_http(finished: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0\r\n")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/metrics"
        with pytest.raises(LauncherError, match="cannot be read: BadStatusLine"):
            run_calibrate(arguments(metrics=url), finished, tmp_path / "c")


def test_the_supervisor_leaves_the_plan_and_what_vllm_reported(bench: Bench, cpu: Hardware) -> None:
    document = {"schema": 1, "calibration": calibration_document(bench.plan, bench.job.footprint.path, cpu)}
    bench.run("slow", signals=(15,), plan_document=document)
    written = json.loads((bench.job.state_dir / "plan.json").read_text())
    assert written["calibration"]["settings"]["model"] == model_fingerprint(bench.job.footprint.path)
    assert written["reality"]["weights_bytes"] == 1.5 * 2**30 and written["reality"]["graph_bytes"] is None
    assert written["reality"]["num_gpu_blocks"] == bench.plan.prediction.num_gpu_blocks
