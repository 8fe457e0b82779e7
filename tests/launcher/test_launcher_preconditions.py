"""What `serve` refuses before it loads, and what it only says."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from step128_launcher.commands.preconditions import check_machine
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.doctor import Finding, run_doctor
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware


def findings(hardware: Hardware, environment: dict[str, str]) -> list[Finding]:
    return run_doctor(hardware, "quad-r9700", environment, configs_dir=find_configs_dir(), model=None, all_reduce=False)


def test_closed_device_nodes_end_with_5(recorded: Callable[[str], Hardware]) -> None:
    hardware = recorded("quad-r9700")
    closed = replace(hardware, device_nodes=tuple(replace(node, accessible=False) for node in hardware.device_nodes))
    with pytest.raises(LauncherError, match="/dev/kfd") as caught:
        check_machine(findings(closed, {}), lambda text: None)
    assert caught.value.exit_code == ExitCode.PERMISSION and caught.value.hint


def test_other_failures_are_said(recorded: Callable[[str], Hardware]) -> None:
    said: list[str] = []
    check_machine(findings(recorded("quad-r9700"), {"NCCL_PROTO": "LL", "VLLM_ROCM_USE_AITER": "1"}), said.append)
    assert any("rccl-protocol" in text for text in said) and any("aiter" in text for text in said)


def test_a_good_machine_says_nothing(recorded: Callable[[str], Hardware]) -> None:
    said: list[str] = []
    check_machine(findings(recorded("quad-r9700"), {}), said.append)
    assert said == []
