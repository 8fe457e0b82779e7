"""Which MTP depth pays: speeds of the same prompts at several depths, compared in pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from step128_evals.acceptance.figures import as_json, decode_speed, drafted_depth, figures
from step128_evals.errors import BadInputError
from step128_evals.runs import Item, Run
from step128_evals.stats import mean_interval

DEPTHS = (0, 1, 2, 3)


def advise(runs: Sequence[Run]) -> dict[str, Any]:
    """Compare the runs' decoding speeds by domain and over all prompts.

    Returns:
        ``measured_depths``, ``missing_depths``, and under ``domains`` and ``all`` for each group: figures by depth,
        each with its ``ratio`` to the smallest depth, and the ``advice``: the smallest depth that cannot be told apart
        from the fastest one.

    Raises:
        BadInputError: fewer than two depths, or runs that do not compare.
    """
    by_depth = _by_depth(runs)
    missing = [depth for depth in DEPTHS if depth not in by_depth]
    if len(by_depth) < 2:
        raise BadInputError(
            f"depth {next(iter(by_depth))} alone compares with nothing. {how_to_measure(missing, runs[0])}"
        )
    settings = next(iter(by_depth.values())).manifest.settings
    everything = {depth: _measured(run) for depth, run in by_depth.items()}
    domains = {}
    for domain in settings["domains"]:
        items = {
            depth: {id: item for id, item in found.items() if item.data["domain"] == domain}
            for depth, found in everything.items()
        }
        domains[domain] = _group(items)
    return {
        "model": runs[0].manifest.model,
        "measured_depths": sorted(by_depth),
        "missing_depths": missing,
        "how_to_measure": how_to_measure(missing, runs[0]) if missing else None,
        "domains": domains,
        "all": _group(everything),
    }


def how_to_measure(missing: Sequence[int], run: Run) -> str:
    """The commands that would fill the gaps."""
    depths = ", ".join(map(str, missing))
    return (
        f"Not measured: depth {depths}. For each depth N: `step128 serve MODEL --num-speculative-tokens N`, then the "
        f"`step128-eval acceptance` that made {run.path.name}; its result goes to a file of that depth."
    )


def _by_depth(runs: Sequence[Run]) -> dict[int, Run]:
    found: dict[int, Run] = {}
    for run in runs:
        if run.manifest.eval != "acceptance":
            raise BadInputError(f"{run.path} is a result of {run.manifest.eval}; results of acceptance are needed")
        depth = drafted_depth(run)
        if depth is None:
            raise BadInputError(f"{run.path}: the server did not tell how many tokens it drafts")
        if depth in found:
            raise BadInputError(f"{run.path} and {found[depth].path} were both measured at depth {depth}")
        if found and (different := _difference(run, next(iter(found.values())))):
            raise BadInputError(f"{run.path} and {next(iter(found.values())).path} do not compare: {different}")
        found[depth] = run
    return dict(sorted(found.items()))


def _difference(run: Run, other: Run) -> str | None:
    if run.manifest.model != other.manifest.model:
        return f"they are of the models {run.manifest.model} and {other.manifest.model}"
    one, two = (each.manifest.settings | {"num_speculative_tokens": None} for each in (run, other))
    names = [name for name in one | two if json.dumps(one.get(name)) != json.dumps(two.get(name))]
    return f"their settings differ in {', '.join(names)}" if names else None


def _measured(run: Run) -> dict[str, Item]:
    return {item.id: item for item in run.with_status("measured") if decode_speed(item.data)}


def _group(items: dict[int, dict[str, Item]]) -> dict[str, Any]:
    """Figures by depth of the prompts that all depths have, ratios, and the advice."""
    common = sorted(set.intersection(*(set(found) for found in items.values())))
    if not common:
        return {"prompts": 0, "depths": {}, "advice": None, "reason": "no prompt was measured at all depths"}
    speeds = {depth: [decode_speed(found[id].data) or 0.0 for id in common] for depth, found in items.items()}
    base = min(speeds)
    depths = {}
    for depth, found in items.items():
        value, interval = paired_ratio(speeds[depth], speeds[base])
        figure = figures([found[id] for id in common], depth)
        chosen = {key: figure[key] for key in figure if key.startswith(("decode", "tokens_per", "mean_accepted"))}
        depths[str(depth)] = chosen | {"ratio": value, "ratio_interval": interval}
    advice, reason = _choose(speeds)
    return {"prompts": len(common), "base": base, "depths": depths, "advice": advice, "reason": reason}


def paired_ratio(speeds: Sequence[float], others: Sequence[float]) -> tuple[float, dict[str, float] | None]:
    """Geometric mean of the ratios prompt by prompt, with its bootstrap interval; every prompt counts the same."""
    logarithms = [math.log(a / b) for a, b in zip(speeds, others, strict=True)]
    interval = as_json(mean_interval(logarithms))
    ends = {name: math.exp(end) for name, end in interval.items()} if interval else None
    return math.exp(sum(logarithms) / len(logarithms)), ends


def _choose(speeds: dict[int, list[float]]) -> tuple[int, str]:
    """The smallest depth that cannot be told apart from the fastest, and why."""
    fastest = max(speeds, key=lambda depth: sum(math.log(speed) for speed in speeds[depth]))
    for depth in sorted(speeds):
        if depth == fastest:
            break
        value, interval = paired_ratio(speeds[fastest], speeds[depth])
        if interval is None:
            return depth, f"one prompt says nothing about how sure {value:.2f} times depth {depth} at {fastest} is"
        if interval["low"] <= 1:
            ends = f"{interval['low']:.2f} to {interval['high']:.2f}"
            return depth, f"depth {fastest} is {value:.2f} times as fast ({ends}), which cannot be told apart from 1"
    tied: list[str] = []
    slower: list[str] = []
    for depth in sorted(set(speeds) - {fastest}):
        _, interval = paired_ratio(speeds[fastest], speeds[depth])
        (slower if interval and interval["low"] > 1 else tied).append(str(depth))
    parts = [f"faster than depth {', '.join(slower)}; no interval includes 1"] if slower else []
    parts += [f"depth {', '.join(tied)} cannot be told apart from it, but drafts more"] if tied else []
    return fastest, "; ".join(parts)
