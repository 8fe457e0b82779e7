"""Prometheus metrics beside vLLM's own: the plan, the supervisor's state and the verification."""

import errno
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.memory import MemoryPlan
from step128_launcher.plan import Plan
from step128_launcher.status import ServerStatus, State
from step128_launcher.verify import Outcome

# vLLM's own metrics start with "vllm:"; these never collide with them.
_VERIFICATION_VALUES = {Outcome.PASS: 1.0, Outcome.WARN: 0.5, Outcome.FAIL: 0.0}


class PlanCollector(Collector):
    """Metrics step128_plan_*, step128_server_* and step128_verification, made anew at each scrape."""

    def __init__(self, plan: Plan, status: ServerStatus) -> None:
        self._plan = plan
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """Yield all metric families."""
        plan = self._plan
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
        yield from self._server()

    def _server(self) -> Iterable[Metric]:
        now = self._status.snapshot()
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


def _memory(memory: MemoryPlan) -> Iterable[Metric]:
    lines = GaugeMetricFamily(
        "step128_plan_memory_bytes", "Planned memory by item, over all ranks.", labels=["item", "evidence"]
    )
    for line in memory.lines:
        lines.add_metric([line.name, line.evidence], line.total_bytes)
    yield lines
    description = "Memory the plan may use."
    yield GaugeMetricFamily("step128_plan_memory_budget_bytes", description, value=memory.budget_bytes)


class Exporter:
    """Serves one collector on its own port and registry."""

    def __init__(self, plan: Plan, status: ServerStatus, host: str, port: int) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(PlanCollector(plan, status))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            code = ExitCode.PERMISSION if error.errno == errno.EACCES else ExitCode.PORT_IN_USE
            raise LauncherError(
                code,
                f"The metrics port {host}:{port} cannot be opened: {error.strerror}.",
                "Choose another with --metrics-port, or 0 for none.",
            ) from error

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
