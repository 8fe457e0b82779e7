"""What the overlays for GPUs do to a container, on devices that are faked: CDI's, and ROCm's looser rules."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from container_stack import Stack

pytestmark = pytest.mark.proof
IN_SHELL = ("run", "--rm", "--no-deps", "--no-TTY", "--entrypoint", "sh", "serve", "-c")


@pytest.fixture
def without_nodes(built: Stack) -> Stack:
    """The stack as on a machine with GPUs, but for /dev/kfd and /dev/dri, which it does not have."""
    return replace(built, overlays=("compose.cdi.yaml",))


def test_the_gpus_come_from_cdi(without_nodes: Stack) -> None:
    stack = without_nodes
    if stack.engine.cdi_dir is None:
        pytest.skip("this engine was not started by the proof, and its CDI folders are left alone")
    nodes = ("dev/kfd", "dev/dri/renderD128")
    edits = {"deviceNodes": [{"path": f"/{node}", "hostPath": str(stack.machine / node)} for node in nodes]}
    devices = [{"name": "all", "containerEdits": edits}]
    stack.engine.cdi_dir.mkdir(exist_ok=True)
    spec = stack.engine.cdi_dir / "amd.json"
    spec.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "amd.com/gpu", "devices": devices}))
    try:
        opened = stack.compose(*IN_SHELL, "for at in /dev/kfd /dev/dri/*; do : <> $at && echo $at; done").stdout
    finally:
        spec.unlink()
        stack.compose("down", "--volumes")
    assert opened.split() == ["/dev/kfd", "/dev/dri/renderD128"]


def test_a_host_without_cdi_is_told_so(without_nodes: Stack) -> None:
    refused = without_nodes.compose(*IN_SHELL, "true", check=False, CDI_DEVICES="amd.com/gpu=nowhere")
    without_nodes.compose("down", "--volumes")
    assert refused.returncode != 0 and "amd.com/gpu=nowhere" in refused.stderr


def test_rocm_compat_lifts_two_restrictions_and_no_other(built: Stack) -> None:
    """A capability that is added reaches no process that does not run as root: it widens what may be had, no more."""
    loose = replace(built, overlays=(*built.overlays, "compose.rocm-compat.yaml"))
    status = loose.compose(*IN_SHELL, "cat /proc/self/status; touch /x; id -u").stdout
    loose.compose("down", "--volumes")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Seccomp"] == "0" and fields["NoNewPrivs"] == "1"
    assert int(fields["CapBnd"], 16) == 1 << 19 and int(fields["CapEff"], 16) == 0  # CAP_SYS_PTRACE
    assert status.splitlines()[-1] == "10001"
