"""The timeline of a soak: latency, memory, load and failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step128_evals.runs import Run
from step128_evals.soak.items import of_kind, requests
from step128_evals.soak.plan import WEIGHTS


def draw_timeline(run: Run, path: Path) -> None:
    """Three panels over the minutes of the soak; a dotted line where an interrupted one went on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    latency, memory, load = figure.subplots(3, 1, sharex=True)
    for kind in (*WEIGHTS, "canary"):
        answered = [item.data for item in of_kind(run, kind) if "seconds" in item.data and item.status == "passed"]
        if answered:
            minutes = [data["started_at"] / 60 for data in answered]
            latency.scatter(minutes, [data["seconds"] for data in answered], s=8, label=kind)
    latency.set_ylabel("whole answer, s")
    latency.set_yscale("log")
    _series(memory, run, "resident_bytes", "memory of the process that answers /metrics", 2**-20, "C0")
    memory.set_ylabel("resident, MiB")
    cache = memory.twinx()
    _series(cache, run, "kv_cache_usage", "KV cache held", 100, "C1")
    cache.set_ylabel("KV cache held, %")
    cache.set_ylim(0, None)
    asked = [item.data for item in requests(run)]
    load.plot(
        [data["started_at"] / 60 for data in asked],
        [data["at_once"] for data in asked],
        ".",
        markersize=3,
        color="0.6",
        label="planned at once",
    )
    _series(load, run, "running", "running", 1, "C0")
    _series(load, run, "waiting", "waiting", 1, "C1")
    failed = [item.data["at"] / 60 for item in requests(run) if item.status == "failed"]
    if failed:
        load.plot(failed, range(1, len(failed) + 1), "rx", label="failed, counted up")
    load.set_ylabel("requests")
    load.set_xlabel("minutes")
    for axes, others in ((latency, ()), (memory, (cache,)), (load, ())):
        axes.grid(alpha=0.3)
        for session in of_kind(run, "session")[1:]:
            axes.axvline(session.data["at"] / 60, color="black", linestyle=":", linewidth=1)
        handles = [handle for each in (axes, *others) for handle in each.get_legend_handles_labels()[0]]
        if handles:
            axes.legend(handles=handles, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles))
    figure.savefig(path)


def _series(axes: Any, run: Run, name: str, label: str, scale: float, color: str) -> None:
    points = [(i.data["at"] / 60, i.data[name] * scale) for i in of_kind(run, "sample") if i.data[name] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label)
