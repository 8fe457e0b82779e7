"""What a soak's items say: errors, leaks, drift, and whether the canary still sings."""

from __future__ import annotations

from collections import Counter

from step128_evals.runs import Run
from step128_evals.soak.drift import drift
from step128_evals.soak.items import Verdict, of_kind, requests, soaked_seconds, verdict
from step128_evals.soak.memory import memory

_SAME_USAGE = 1e-6
_FEWEST_UNDER_LOAD = 5


def all_verdicts(run: Run) -> dict[str, Verdict]:
    """Every verdict by its name."""
    seconds = soaked_seconds(run)
    return {
        "errors": errors(run),
        "drained": drained(run),
        "memory": memory(run, seconds),
        "drift_first_token": drift(run, seconds, "first_token_seconds"),
        "drift_decode": drift(run, seconds, "decode_tokens_per_second"),
        "canary": canary(run),
    }


def errors(run: Run) -> Verdict:
    """Any request without a whole answer."""
    asked = [*requests(run), *of_kind(run, "canary")]
    failed = [item for item in asked if item.status == "failed"]
    if not asked:
        return verdict("unsupported", "nothing was asked yet")
    if not failed:
        return verdict("passed", f"{len(asked)} requests, none failed", failed=0)
    reasons = Counter(item.why for item in failed).most_common(3)
    listed = "; ".join(f"{count} times: {why}" for why, count in reasons)
    return verdict("failed", f"{len(failed)} of {len(asked)} requests failed: {listed}", failed=len(failed))


def drained(run: Run) -> Verdict:
    """After the last request: nothing runs or waits, and no more of the KV cache is held than before the first."""
    samples = [item.data for item in of_kind(run, "sample") if item.data["drained"]]
    if not samples:
        return verdict("unsupported", "there is no reading of /metrics after the end")
    last = samples[-1]
    held = {name: last[name] for name in ("running", "waiting", "kv_cache_usage")}
    if held["running"] is None:
        return verdict("unsupported", "/metrics does not tell how many requests run")
    usage, before = held["kv_cache_usage"], _usage_before(run)
    cache = "not told" if usage is None else f"{usage:.2%}, before the first request {before:.2%}"
    shown = f"{held['running']:.0f} running, {held['waiting'] or 0:.0f} waiting, KV cache held: {cache}"
    clean = not held["running"] and not held["waiting"] and (usage or 0.0) <= before + _SAME_USAGE
    return verdict("passed" if clean else "failed", f"after the end: {shown}", **held)


def _usage_before(run: Run) -> float:
    """Share of the KV cache that the server held at rest before the soak; 0 where requests of others ran in it."""
    reading = run.items["alone-before"].data if "alone-before" in run.items else {}
    busy = reading.get("running") or reading.get("waiting")
    return 0.0 if busy else float(reading.get("kv_cache_usage") or 0.0)


def canary(run: Run) -> Verdict:
    """Whether the canary alone, after the soak, gives no answer but those that it gave alone before, and under load
    at least one of them.

    Under load its answers may differ: requests of one batch are summed in another order than alone, and greedy choices
    between near equals flip. But not every one of them, if alone it is always the same. An empty answer is none.
    """
    sung = [item for item in of_kind(run, "canary") if item.status == "passed"]
    before, after = ({item.data["text"] for item in sung if item.data["alone"] == when} for when in ("before", "after"))
    loaded = [item.data["text"] for item in sung if not item.data["alone"]]
    as_before = sum(text in before for text in loaded)
    empty = sum(not item.data["text"].strip() for item in sung)
    figures = {
        "asked": len(sung),
        "empty": empty,
        "distinct_under_load": len(set(loaded)),
        "as_before_under_load": as_before / len(loaded) if loaded else None,
    }
    counted = f"under load {len(loaded)} answers, {len(set(loaded))} distinct, {as_before} as alone before"
    if empty:
        return verdict("failed", f"{empty} of {len(sung)} answers are empty; {counted}", **figures)
    if not before or not after:
        return verdict("unsupported", f"it was not asked alone both before and after; {counted}", **figures)
    if strange := len(after - before):
        return verdict("failed", f"alone, {strange} of the answers after were not given before; {counted}", **figures)
    if len(loaded) < _FEWEST_UNDER_LOAD:
        counted += f" (too few to judge: fewer than {_FEWEST_UNDER_LOAD})"
    elif not as_before and len(before) == 1:
        return verdict("failed", f"alone always the same answer, and never that one under load; {counted}", **figures)
    return verdict("passed", f"alone, no answer after that was not given before; {counted}", **figures)
