"""The doctor's real all-reduce: two ranks over gloo, a rank that never joins, and a probe that fails."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from step128_launcher.doctor import all_reduce
from step128_launcher.doctor.all_reduce import check_all_reduce, run_probe
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe

MACHINES = Path(__file__).parents[1] / "machines"


def probes(marker: str) -> list[int]:
    """Processes started with `marker` in their environment that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(os.environ) | {"STEP128_TEST_MARKER": f"{request.node.name}-{os.getpid()}", "OMP_NUM_THREADS": "1"}


def test_two_ranks_over_gloo(environment: dict[str, str]) -> None:
    pytest.importorskip("torch")
    found = run_probe(2, "gloo", environment, 60.0)
    assert found.outcome == "PASS", found
    assert "gloo, 2 ranks, sums right: 8 KiB in" in found.evidence and "65536 KiB in" in found.evidence
    assert not probes(environment["STEP128_TEST_MARKER"])


def test_a_rank_that_never_joins_ends_at_the_limit_with_nothing_left(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    start = time.monotonic()
    found = run_probe(2, "gloo", environment, 8.0, "--absent", "1")
    assert time.monotonic() - start < 12.0
    assert found.outcome == "FAIL" and "no result within 8 s" in found.evidence
    deadline = time.monotonic() + 3.0
    while probes(environment["STEP128_TEST_MARKER"]) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel still takes apart what was killed
    assert not probes(environment["STEP128_TEST_MARKER"])
    assert not list(tmp_path.iterdir())


def test_a_failing_probe_is_reported_with_its_last_word(environment: dict[str, str]) -> None:
    pytest.importorskip("torch")
    import torch

    ranks = torch.cuda.device_count() + 2
    found = run_probe(ranks, "nccl", environment, 60.0)
    assert found.outcome == "FAIL" and f"{ranks} are needed" in found.evidence and "--backend nccl" in found.remedy


@pytest.mark.parametrize("output", ["", "not json", "[]", '{"all_reduce_microseconds": {"a": 1}}', '{"ranks": 2}'])
def test_a_probe_without_a_result_is_no_pass(output: str) -> None:
    assert all_reduce._report(2, "gloo", output).outcome == "FAIL"


def test_when_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = MACHINES / "quad-r9700"
    context = Context(probe(tree, {}), {}, None, Path("/"), tree)
    assert "not asked for" in check_all_reduce(context, wanted=False, on_cpu=False).evidence
    recorded = replace(context, root=tree)
    assert "recorded" in check_all_reduce(recorded, wanted=True, on_cpu=False).evidence
    lone = replace(context, hardware=probe(MACHINES / "single-r9700", {}))
    assert "fewer than two" in check_all_reduce(lone, wanted=True, on_cpu=False).evidence
    monkeypatch.setattr(all_reduce, "find_spec", lambda name: None)
    assert "torch is not installed" in check_all_reduce(context, wanted=True, on_cpu=False).evidence


def test_safe_settings_and_no_integrated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2P can reset the host, so it is off unless the user's own environment says otherwise."""
    calls: list[tuple[int, str, dict[str, str]]] = []

    def record(ranks: int, backend: str, environment: dict[str, str], limit: float) -> None:
        calls.append((ranks, backend, environment))

    monkeypatch.setattr(all_reduce, "run_probe", record)
    tree = MACHINES / "quad-r9700"
    quad, extra = probe(tree, {}), probe(MACHINES / "r9700-plus-igpu", {}).gpus[1]
    both = replace(quad, gpus=(*quad.gpus, replace(extra, kfd_node=0)))
    check_all_reduce(Context(both, {"A": "b"}, None, Path("/"), tree), wanted=True, on_cpu=False)
    user = {"NCCL_P2P_DISABLE": "0"}
    check_all_reduce(Context(quad, user, None, Path("/"), tree), wanted=True, on_cpu=False)
    check_all_reduce(Context(quad, user, None, Path("/"), tree), wanted=True, on_cpu=True)
    safe = {"NCCL_P2P_DISABLE": "1", "NCCL_PROTO": "Simple"}
    assert calls[0] == (4, "nccl", {"A": "b", "HIP_VISIBLE_DEVICES": "1,2,3,4"} | safe)
    assert calls[1] == (4, "nccl", safe | user)
    assert calls[2] == (2, "gloo", user)
