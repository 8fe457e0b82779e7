"""Prometheus metrics beside vLLM's own: the plan, the supervisor's state, the checks, and plan against reality."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from step128_launcher.planning.items import MemoryPlan
from step128_launcher.planning.plan import Plan
from step128_launcher.supervisor.comparison import Row
from step128_launcher.supervisor.hang import Activity
from step128_launcher.supervisor.status import ServerStatus, Snapshot, State
from step128_launcher.supervisor.verify import Outcome

# vLLM's own metrics start with "vllm:"; these never collide with them.
_VERIFICATION_VALUES = {Outcome.PASS: 1.0, Outcome.WARN: 0.5, Outcome.FAIL: 0.0}


class ServerCollector(Collector):
    """Metrics step128_plan_*, step128_server_*, step128_verification and plan against reality, anew at each scrape."""

    def __init__(self, status: ServerStatus) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """Yield all metric families; those of a plan only once there is one."""
        now = self._status.snapshot()
        if now.plan is not None:
            yield from _plan(now.plan)
        yield from _server(now)
        yield from _troubles(now)
        yield from _comparison(now.comparison)


def _plan(plan: Plan) -> Iterable[Metric]:
    yield InfoMetricFamily(
        "step128_plan",
        "Settings of the plan that are not numbers.",
        value={"profile": plan.profile, "dtype": plan.dtype, "kv_cache_dtype": plan.kv_cache_dtype},
    )
    gauges = {
        "max_model_len_tokens": ("Longest context.", plan.max_model_len),
        "num_speculative_tokens": ("Tokens drafted by MTP in a step.", plan.num_speculative_tokens),
        "tensor_parallel_size": ("Ranks the weights are cut into.", plan.tensor_parallel_size),
        "max_num_seqs": ("Requests decoded at once.", plan.max_num_seqs),
        "max_num_batched_tokens": ("Tokens of one scheduler step.", plan.max_num_batched_tokens),
        "kv_cache_memory_bytes": ("KV cache of one rank.", plan.kv_cache_memory_bytes),
        "num_gpu_blocks": ("KV-cache blocks, as vLLM should report them.", plan.prediction.num_gpu_blocks),
        "kv_cache_size_tokens": ("KV-cache capacity, likewise.", plan.prediction.kv_cache_size_tokens),
        "kv_cache_max_concurrency": ("Full-length requests, likewise.", plan.prediction.kv_cache_max_concurrency),
    }
    for name, (description, value) in gauges.items():
        yield GaugeMetricFamily(f"step128_plan_{name}", description, value=value)
    yield from _memory(plan.memory)


def _server(now: Snapshot) -> Iterable[Metric]:
    states = GaugeMetricFamily("step128_server_state", "1 for the state the server is in.", labels=["state"])
    for state in State:
        states.add_metric([state.value], float(state is now.state))
    yield states
    description = "1 while the server is ready and answers /health."
    yield GaugeMetricFamily("step128_server_healthy", description, value=float(now.healthy))
    if now.start_seconds is not None:
        description = "Time from the start of vLLM to a verified server."
        yield GaugeMetricFamily("step128_server_start_seconds", description, value=now.start_seconds)
    checks = GaugeMetricFamily(
        "step128_verification", "1 passed, 0.5 differs from the prediction, 0 failed.", labels=["check"]
    )
    for check in now.checks:
        checks.add_metric([check.name], _VERIFICATION_VALUES[check.outcome])
    yield checks


def _troubles(now: Snapshot) -> Iterable[Metric]:
    restarts = CounterMetricFamily("step128_server_restarts", "Restarts after a failure.", labels=["reason"])
    for reason, count in now.restarts.items():
        restarts.add_metric([reason], count)
    yield restarts
    description = "Steps to a leaner plan after an out-of-memory at start."
    yield CounterMetricFamily("step128_server_step_downs", description, value=now.step_downs)
    hung = GaugeMetricFamily("step128_server_hung", "1 for what a server does that does not answer.", labels=["kind"])
    for activity in Activity:
        hung.add_metric([activity.value], float(activity is now.hung))
    yield hung
    failed = GaugeMetricFamily(
        "step128_server_failed", "1 once the launcher gave up, with its exit code.", labels=["exit_code"]
    )
    if now.failure is not None:
        failed.add_metric([str(now.failure.exit_code)], 1.0)
    yield failed


def _comparison(rows: tuple[Row, ...]) -> Iterable[Metric]:
    """Yield planned, measured and their difference: sizes under one name each, by item, and each count by itself."""
    kinds = {
        "planned": "As planned",
        "measured": "As vLLM reports it",
        "plan_difference": "Measured less planned",
    }
    for kind, description in kinds.items():
        sizes = GaugeMetricFamily(f"step128_{kind}_bytes", f"{description}, on one rank.", labels=["item"])
        for row in rows:
            if row.item.in_bytes:
                sizes.add_metric([row.item.name], _figure(row, kind))
        yield sizes
        for row in rows:
            if not row.item.in_bytes:
                name = f"step128_{kind}_{row.item.name}"
                yield GaugeMetricFamily(name, f"{description}: {row.item.label}.", value=_figure(row, kind))


def _figure(row: Row, kind: str) -> float:
    return {"planned": row.planned, "measured": row.measured, "plan_difference": row.difference}[kind]


def _memory(memory: MemoryPlan) -> Iterable[Metric]:
    lines = GaugeMetricFamily(
        "step128_plan_memory_bytes", "Planned memory by item, of one GPU, or of the host.", labels=["item", "evidence"]
    )
    for line in memory.lines:
        lines.add_metric([line.name, line.evidence], line.total_bytes)
    yield lines
    description = "Memory the plan may use."
    yield GaugeMetricFamily("step128_plan_memory_budget_bytes", description, value=memory.budget_bytes)
