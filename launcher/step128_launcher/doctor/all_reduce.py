"""A real all-reduce among the GPUs, under a time limit: the only sure sign that a start will not hang in RCCL."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped
from step128_launcher.machine.types import Gpu
from step128_launcher.machine.visibility import hip_order

NAME = "all-reduce"
LIMIT_SECONDS = 120.0
_MODULE = "step128_kernels.all_reduce_probe"
# Both are what the profiles set: P2P can reset the host, and the LL protocol can deadlock. A value of the user's own
# goes before them, for who wants to try P2P.
_SAFE = {"NCCL_P2P_DISABLE": "1", "NCCL_PROTO": "Simple"}
_KILL_SECONDS = 10.0


def check_all_reduce(context: Context, *, wanted: bool, on_cpu: bool, limit_seconds: float = LIMIT_SECONDS) -> Finding:
    """Run the probe on all usable cards, or with two ranks on the CPU; SKIP if it was not asked for or cannot run."""
    if not wanted:
        return skipped(NAME, "not asked for; it uses the GPUs", "step128 doctor --all-reduce")
    if not context.is_live:
        return skipped(NAME, "a recorded machine cannot run it")
    if find_spec("torch") is None or find_spec("step128_kernels") is None:
        return skipped(NAME, "torch is not installed here; run it in the serving container")
    if on_cpu:
        return run_probe(2, "gloo", context.environment, limit_seconds)
    cards = context.cards or tuple(gpu for gpu in context.hardware.usable_gpus if not gpu.integrated)
    if len(cards) < 2:
        return skipped(NAME, "fewer than two usable cards")
    settings = {name: context.setting(name)[0] or value for name, value in _SAFE.items()}
    return run_probe(len(cards), "nccl", dict(context.environment) | settings | _only(context, cards), limit_seconds)


def run_probe(ranks: int, backend: str, environment: Mapping[str, str], limit_seconds: float, *options: str) -> Finding:
    """Run the probe in a process group of its own, and end the whole group at the limit."""
    # The folder where the ranks meet is ours: a probe that is killed cannot remove it.
    with tempfile.TemporaryDirectory(prefix="step128-all-reduce-") as folder:
        return _run_probe(ranks, backend, environment, limit_seconds, "--folder", folder, *options)


def _run_probe(
    ranks: int, backend: str, environment: Mapping[str, str], limit_seconds: float, *options: str
) -> Finding:
    import subprocess  # only here: nothing else of the launcher's start needs it

    command = [sys.executable, "-m", _MODULE, "--ranks", str(ranks), "--backend", backend]
    command += ["--limit-seconds", str(limit_seconds), *options]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=dict(environment) | {"PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return _hung(ranks, backend, limit_seconds, _end(process))
    finally:
        if process.returncode != 0:  # ended by itself and well, it waited for its ranks
            _kill_group(process.pid)
    if process.returncode != 0:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        return failed(
            NAME,
            f"{backend}, {ranks} ranks: exit {process.returncode}: {last[0][:200]}",
            "Run it by hand for the whole message: " + " ".join(["python", *command[1:7]]),
        )
    return _report(ranks, backend, output)


def _report(ranks: int, backend: str, output: str) -> Finding:
    try:
        document: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        times = {int(size): float(value) for size, value in document["all_reduce_microseconds"].items()}
    except (IndexError, KeyError, ValueError, TypeError, AttributeError):
        return failed(NAME, f"{backend}, {ranks} ranks: the probe printed no result", "Report this as a bug.")
    shown = ", ".join(f"{size // 1024} KiB in {value:.0f} µs" for size, value in times.items())
    return passed(NAME, f"{backend}, {ranks} ranks, sums right: {shown}; torch {document.get('torch', '?')}")


def _hung(ranks: int, backend: str, limit_seconds: float, ended: bool) -> Finding:
    rest = "" if ended else "; a process of it could not be ended, it is stuck in the driver"
    return failed(
        NAME,
        f"{backend}, {ranks} ranks: no result within {limit_seconds:.0f} s, so a start would hang{rest}",
        "With NCCL_P2P_DISABLE=1 and NCCL_PROTO=Simple set: see `sudo dmesg`, iommu=pt, and the cards' links."
        if ended
        else "Reboot, then look at `sudo dmesg` of the boot before (journalctl -k -b -1).",
    )


def _end(process: Any) -> bool:
    """Kill the group and wait for the leader; whether that succeeded."""
    import subprocess

    _kill_group(process.pid)
    try:
        process.communicate(timeout=_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_group(pid: int) -> None:
    """End every process of the probe; there is none left after it ended by itself."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _only(context: Context, cards: tuple[Gpu, ...]) -> dict[str, str]:
    """Return the variable that keeps integrated GPUs out, unless the user chose the GPUs."""
    order = hip_order(context.hardware.gpus)
    if context.hardware.visible_devices or len(order) == len(cards):
        return {}
    return {"HIP_VISIBLE_DEVICES": ",".join(str(index) for index, gpu in enumerate(order) if gpu in cards)}
