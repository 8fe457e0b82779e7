"""Real names and shapes: three full MoE layers, over 25 GB in bfloat16, through `prune` and `quantize`.

Each is run once without a break, and once killed at 20 random points and resumed; both must give the same bytes. Every
process's peak memory must stay within what `--max-memory` promises by default.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic import real_config, write_synthetic

from step128_checkpoint.memory import DEFAULT_MAX_MEMORY_BYTES
from step128_checkpoint.reader import open_checkpoint

KILLS = 20
LAYER_BYTES = 288 * 3 * 1280 * 4096 * 2
SMALLEST_BYTES = 25e9

# Runs one conversion; kills itself, without warning, when `left` bytes are done (those found finished count too).
RUN = """
import json, os, re, signal, sys, time
from pathlib import Path
from step128_checkpoint.conversion import convert
from step128_checkpoint.policy import load_policy
from step128_checkpoint.pruning.decide import Pruning
from step128_checkpoint.pruning.prune import plan_pruning
from step128_checkpoint.quantization.importance import open_importance
from step128_checkpoint.quantize import Weighting, plan_quantization
from step128_checkpoint.reader import open_checkpoint
command, source, out, left = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
checkpoint = open_checkpoint(source)
if command == "prune":
    kept = {int(layer): tuple(experts) for layer, experts in json.loads(sys.argv[5]).items()}
    plan = plan_pruning(checkpoint, Pruning(kept=kept, criterion="random", seed=0))
else:
    weighting = Weighting(open_importance(Path(sys.argv[5]), checkpoint))
    plan = plan_quantization(checkpoint, load_policy(), "importance", weighting)
def count(done):
    global left
    left -= done
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
started = time.monotonic()
convert(plan, out, os.cpu_count(), False, count)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"seconds": time.monotonic() - started, "peak_bytes": peak}))
"""


def run(command: str, source: Path, out: Path, extra: str, kill_after_bytes: float = float("inf")) -> Any:
    """The figures of a whole run, or None of a killed one."""
    arguments = [sys.executable, "-c", RUN, command, str(source), str(out), str(kill_after_bytes), extra]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hashes(folder: Path) -> dict[str, Any]:
    """The hash of every tensor and file as the manifest states them; `verify` proves that the manifest is right."""
    manifest = json.loads((folder / "step128_manifest.json").read_text())
    return {"tensors": manifest["tensors"], "files": manifest["files"]}


def whole_and_killed(
    command: str, source: Path, out: Path, extra: str, measured: Callable[[str], None], weights: float
) -> None:
    figures = run(command, source, out, extra)
    total_bytes = sum(tensor.size_bytes for tensor in open_checkpoint(out).tensors.values())
    whole = hashes(out)
    shutil.rmtree(out)
    points = sorted(random.Random(command).uniform(0.02, 0.99) * total_bytes for _ in range(KILLS))
    started = time.monotonic()
    for point in points:
        assert run(command, source, out, extra, point) is None
        assert not out.exists()
    resumed = run(command, source, out, extra)
    resumed_seconds = time.monotonic() - started
    assert hashes(out) == whole
    verified = subprocess.run(
        [str(Path(sys.executable).parent / "step128-checkpoint"), "verify", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    for figure in (figures, resumed):
        assert figure["peak_bytes"] <= DEFAULT_MAX_MEMORY_BYTES
    rate = f"{weights / figures['seconds'] / 1e6:.1f} M weights/s" if weights else "no weights computed"
    measured(
        f"{command}: {total_bytes / 1e9:.1f} GB written in {figures['seconds']:.0f} s ({rate}), peak "
        f"{figures['peak_bytes'] / 1e6:.0f} MB; killed {KILLS} times and resumed: {resumed_seconds:.0f} s, peak of the "
        f"last run {resumed['peak_bytes'] / 1e6:.0f} MB, same bytes"
    )


@pytest.mark.proof
def test_full_layers_through_prune_and_quantize(tmp_path: Path, measured: Callable[[str], None]) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    # The input and one pruned copy of it at a time; embedding, heads and room for the journal besides.
    layers = min(3, int((free_bytes - 6e9) / (LAYER_BYTES * (1 + 240 / 288))))
    if layers < 3:
        measured(f"{free_bytes / 1e9:.0f} GB of disk are free: only {layers} of 3 layers")
    assert layers >= 1, "not even one full layer fits on this disk"
    source, pruned, packed = tmp_path / "bf16", tmp_path / "pruned", tmp_path / "nl4"
    try:
        size_bytes = write_synthetic(source, real_config(layers))
        assert layers < 3 or size_bytes >= SMALLEST_BYTES
        measured(f"synthetic checkpoint: {layers} full MoE layers, {size_bytes / 1e9:.1f} GB")
        kept = {n: sorted(random.Random(n).sample(range(288), 240)) for n in range(layers)}
        whole_and_killed("prune", source, pruned, json.dumps(kept), measured, 0)
        shutil.rmtree(source)
        checkpoint = open_checkpoint(pruned)
        generator = np.random.default_rng(0)
        importance = {
            name: generator.lognormal(0, 2, (*tensor.shape[:-2], tensor.shape[-1])).astype(np.float32)
            for name, tensor in checkpoint.tensors.items()
            if name.endswith("_proj.weight") and "g_proj" not in name and "vit" not in name
        }
        save_file(importance, tmp_path / "importance.safetensors")
        weights = float(sum(checkpoint.tensors[name].elements for name in importance))
        path = str(tmp_path / "importance.safetensors")
        whole_and_killed("quantize", pruned, packed, path, measured, weights)
    finally:
        for folder in tmp_path.iterdir():  # pytest keeps what tests leave, and this is tens of gigabytes
            shutil.rmtree(folder, ignore_errors=True)
