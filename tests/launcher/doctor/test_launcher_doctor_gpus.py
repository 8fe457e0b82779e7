"""The doctor's checks of which GPUs would serve, and whether a process may open them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.doctor import Finding, containers, visibility
from step128_launcher.doctor.context import Context

QUAD = "quad-r9700"
STRIX = "strix-halo-128-gtt120"
BOTH = "r9700-plus-igpu"
SINGLE = "single-r9700"
LXC = "strix-halo-lxc"
NONE = "no-gpu"
SPARK = "dgx-spark"
GIB = 2**30
HIDDEN = {"HIP_VISIBLE_DEVICES": "-1"}

machine = dict  # changes of the machine


def gpu(number: int | None, **fields: Any) -> tuple[int | None, dict[str, Any]]:
    return number, fields


CASES: list[tuple[Callable[[Context], Finding], str, Any, dict[str, str], str, str]] = [
    (visibility.check_unreadable, QUAD, None, {}, "PASS", "could be read"),
    (visibility.check_unreadable, QUAD, machine(unreadable=("/sys/x: EPERM",) * 6), {}, "WARN", "and 2 more"),
    (visibility.check_gpus, QUAD, None, {}, "PASS", "0000:63:00.0 AMD Radeon AI PRO R9700 (gfx1201)"),
    (visibility.check_gpus, QUAD, None, HIDDEN, "FAIL", "HIP_VISIBLE_DEVICES=-1"),
    (visibility.check_gpus, "gpu-node", None, {}, "FAIL", "dmesg"),
    (visibility.check_gpus, NONE, None, {}, "SKIP", "CPU"),
    (visibility.check_variables, QUAD, None, {}, "PASS", "none of"),
    (visibility.check_variables, QUAD, None, {"HIP_VISIBLE_DEVICES": "0,1"}, "PASS", "2 GPUs"),
    (
        visibility.check_variables,
        QUAD,
        None,
        {"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "2,3"},
        "FAIL",
        "HIP_VISIBLE_DEVICES only",
    ),
    (
        visibility.check_variables,
        QUAD,
        None,
        {"HIP_VISIBLE_DEVICES": "2,3", "ROCR_VISIBLE_DEVICES": "2,3"},
        "FAIL",
        "0 of the 2",
    ),
    (
        visibility.check_variables,
        QUAD,
        None,
        {"HIP_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "2,3"},
        "WARN",
        "2 of the 2",
    ),
    (visibility.check_variables, QUAD, None, {"HIP_VISIBLE_DEVICES": "0000:03:00.0"}, "WARN", "neither an index"),
    (visibility.check_variables, "dgx-spark", None, {"CUDA_VISIBLE_DEVICES": "0"}, "SKIP", "no AMD GPU"),
    (visibility.check_integrated, QUAD, None, {}, "PASS", "no mix"),
    (visibility.check_integrated, BOTH, None, {}, "PASS", "sets HIP_VISIBLE_DEVICES=0,"),
    (visibility.check_integrated, BOTH, None, {"HIP_VISIBLE_DEVICES": "0,1"}, "FAIL", "export HIP_VISIBLE_DEVICES=0 "),
    (visibility.check_integrated, BOTH, None, {"HIP_VISIBLE_DEVICES": "0"}, "PASS", "no mix"),
    (visibility.check_integrated, NONE, None, {}, "SKIP", "no usable"),
    (visibility.check_order, QUAD, None, {}, "PASS", "3 = 0000:63:00.0"),
    (visibility.check_order, QUAD, gpu(3, kfd_node=0), {}, "WARN", "0 = 0000:63:00.0"),
    (visibility.check_order, SINGLE, None, {}, "SKIP", "fewer than two"),
    (visibility.check_rank_count, QUAD, None, {}, "PASS", "cards: 4"),
    (visibility.check_rank_count, QUAD, 3, {}, "WARN", "only 2 can be used"),
    (visibility.check_rank_count, STRIX, None, {}, "SKIP", "shares the host's memory"),
    (containers.check_devices, QUAD, None, {}, "PASS", "/dev/kfd"),
    (containers.check_devices, NONE, None, {}, "SKIP", "no GPU"),
    (containers.check_devices, "dgx-spark", None, {}, "PASS", "/dev/nvidiactl"),
    (containers.check_devices, QUAD, machine(device_nodes=()), {}, "FAIL", "modprobe amdgpu"),
    (containers.check_devices, QUAD, machine(device_nodes=(), container="docker"), {}, "FAIL", "--device /dev/kfd"),
    (containers.check_devices, LXC, machine(device_nodes=()), {}, "FAIL", "lxc.mount.entry"),
    (containers.check_shared_memory, QUAD, None, {}, "PASS", "62.82 GiB"),
    (containers.check_shared_memory, QUAD, machine(shm_bytes=64 << 20), {}, "FAIL", "--shm-size 16g"),
    (containers.check_shared_memory, QUAD, machine(shm_bytes=4 * GIB), {}, "WARN", "4.00 GiB"),
    (containers.check_shared_memory, QUAD, machine(shm_bytes=None), {}, "SKIP", "cannot be read"),
    (containers.check_shared_memory, STRIX, machine(shm_bytes=64 << 20), {}, "SKIP", "one GPU"),
    (containers.check_leftovers, QUAD, None, {}, "SKIP", "cannot be listed"),
    (visibility.check_rank_count, SPARK, (None, {"integrated": False}), {}, "PASS", "cards: 1"),
    (visibility.check_rank_count, SPARK, None, {}, "SKIP", "NVIDIA GB10 shares"),
    (containers.check_shared_memory, NONE, {"shm_bytes": 64 << 20}, {}, "WARN", "--tensor-parallel-size 2"),
    (containers.check_shared_memory, NONE, {"shm_bytes": 2 * GIB}, {}, "PASS", "--tensor-parallel-size 2"),
    (containers.check_devices, QUAD, {"gpus": (), "device_nodes": ()}, {}, "FAIL", "/dev/kfd not there"),
    (containers.check_devices, SPARK, {"gpus": (), "device_nodes": ()}, {}, "FAIL", "/dev/nvidiactl not there"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__[6:]}-{case[1]}-{case[4]}")
def test_findings(case: Any, expect: Callable[[Any], None]) -> None:
    expect(case)


@pytest.mark.parametrize(
    ("container", "groups", "remedy"),
    [
        (None, (44, 992, 1000), "usermod -aG $(getent group 993 "),
        ("docker", (1000,), "--group-add 993"),
        ("docker", (993, 1000), "--device /dev/kfd"),
        ("podman", (1000,), "keep-groups"),
        ("lxc", (1000,), "lxc.idmap"),
    ],
)
def test_device_nodes_that_may_not_be_opened(
    look: Callable[..., Finding], context: Callable[..., Context], container: str | None, groups: Any, remedy: str
) -> None:
    nodes = context(QUAD).hardware.device_nodes
    for denied in nodes:
        fields = {
            "device_nodes": tuple(replace(node, accessible=node != denied, group_id=993) for node in nodes),
            "container": container,
            "groups": groups,
        }
        found = look(containers.check_devices, QUAD, fields)
        assert found.outcome == "FAIL" and remedy in found.remedy, found
        assert f"{denied.path} (group 993); " in found.evidence and ", ".join(map(str, groups)) in found.evidence


def test_nodes_of_hidden_gpus_count_and_those_of_others_do_not(
    look: Callable[..., Finding], context: Callable[..., Context]
) -> None:
    def closed(tree: str, path: str, environment: dict[str, str]) -> Finding:
        nodes = context(tree).hardware.device_nodes
        fields = {"device_nodes": tuple(replace(node, accessible=node.path != path) for node in nodes)}
        return look(containers.check_devices, tree, fields, environment)

    assert closed(QUAD, "/dev/dri/renderD131", {"HIP_VISIBLE_DEVICES": "0"}).outcome == "FAIL"
    assert closed(SPARK, "/dev/nvidia-uvm", {}).outcome == "FAIL"
    found = look(
        containers.check_devices,
        SPARK,
        {
            "device_nodes": (
                *context(SPARK).hardware.device_nodes,
                replace(context(SPARK).hardware.device_nodes[0], path="/dev/dri/renderD128", accessible=False),
            )
        },
    )
    assert found.outcome == "PASS", found


def test_leftover_segments(look: Callable[..., Finding], tree: Callable[[str], Path]) -> None:
    root = tree(QUAD)
    (root / "dev/shm").mkdir()
    assert look(containers.check_leftovers, root).outcome == "PASS"
    for name in ("nccl-abc", "psm_1", "someone-elses"):
        with (root / "dev/shm" / name).open("wb") as file:
            file.truncate(100 << 20)  # a hole: takes no space
    found = look(containers.check_leftovers, root)
    assert found.outcome == "WARN" and "2 segments" in found.evidence and "200.0 MiB" in found.evidence
