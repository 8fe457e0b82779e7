"""Cold start of `step128 plan`: from the process's start to its whole output, against an empty Python.

Plans the 240-expert model on the recorded quad-r9700 from config.json alone (policy all-linears), and a real checkpoint
if its folder is given. Each run is a new process; the first is not counted, since it fills the page cache. The last
line is one JSON document: the settings, and for each command the median, the least and all seconds, and the medians'
difference to `python -c pass`.

    python benchmarks/plan_start.py [CHECKPOINT] [--runs 15]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "data" / "step-3.7-flash-240"
MACHINE = ROOT / "tests" / "machines" / "quad-r9700"


def measure(command: list[str], runs: int) -> dict[str, Any]:
    """Run `command` once, then `runs` times; wall-clock seconds of those. Raises CalledProcessError if it fails."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - start, 4))
    counted = seconds[1:]
    return {"median_seconds": round(statistics.median(counted), 4), "min_seconds": min(counted), "seconds": counted}


def main() -> None:
    """Measure, print a line for each command, then the document."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a checkpoint to plan as well, with its shards")
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each command (default: %(default)s)")
    options = parser.parse_args()
    plan = [sys.executable, "-m", "step128_launcher.cli", "plan"]
    recorded = [*plan, str(MODEL), "--policy", "all-linears", "--machine", str(MACHINE)]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "step128 plan, recorded machine": recorded,
        "step128 plan --json, recorded machine": [*recorded, "--json"],
    }
    if options.checkpoint is not None:
        commands["step128 plan, checkpoint"] = [*plan, str(options.checkpoint), "--profile", "cpu"]
    results = {name: measure(command, options.runs) for name, command in commands.items()}
    empty = results["python -c pass"]["median_seconds"]
    for name, result in results.items():
        result["median_above_empty_seconds"] = round(result["median_seconds"] - empty, 4)
        print(f"{name}: median {result['median_seconds']:.3f} s, least {result['min_seconds']:.3f} s")
    document = {"runs": options.runs, "cpus": os.cpu_count(), "python": platform.python_version(), "results": results}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
