"""The plan's figures beside those that vLLM reports; what it does not report is not compared."""

from collections.abc import Mapping
from dataclasses import dataclass

from step128_launcher.planning.plan import Plan
from step128_launcher.sizes import format_bytes
from step128_launcher.supervisor.reality import LOG_PRECISION_BYTES, Reality


@dataclass(frozen=True)
class Item:
    """One comparable figure: its name in metrics and files, and for people; in bytes on one rank, or a count."""

    name: str
    label: str
    in_bytes: bool


ITEMS = (
    Item("weights", "weights", True),
    Item("activations", "activations", True),
    Item("graphs", "graphs", True),
    Item("non_torch", "runtime, RCCL, code", True),
    Item("kv_cache", "KV cache", True),
    Item("num_gpu_blocks", "KV blocks", False),
    Item("kv_cache_size_tokens", "KV tokens", False),
    Item("kv_cache_max_concurrency", "requests of full length", False),
)


@dataclass(frozen=True)
class Row:
    """One item on both sides."""

    item: Item
    planned: float
    measured: float

    @property
    def difference(self) -> float:
        """Measured less planned: above zero, the plan was too low."""
        return self.measured - self.planned

    @property
    def within_precision(self) -> bool:
        """Whether the difference is smaller than what vLLM's log or metric tells apart."""
        return abs(self.difference) <= (LOG_PRECISION_BYTES if self.item.in_bytes else 0.005)


def planned_figures(plan: Plan) -> dict[str, float]:
    """Return item name -> planned figure; an item whose planned figure is zero is one its backend does not report."""
    expected, prediction = plan.expected, plan.prediction
    figures = {
        "weights": expected.weights_bytes,
        "activations": expected.activation_bytes,
        "graphs": expected.graph_bytes,
        "non_torch": expected.non_torch_bytes,
        "kv_cache": plan.kv_cache_memory_bytes,
        "num_gpu_blocks": prediction.num_gpu_blocks,
        "kv_cache_size_tokens": prediction.kv_cache_size_tokens,
        "kv_cache_max_concurrency": prediction.kv_cache_max_concurrency,
    }
    return {name: float(figure) for name, figure in figures.items()}


def measured_figures(reality: Reality) -> dict[str, float]:
    """Return item name -> reported figure, those not reported left out."""
    figures = {
        "weights": reality.weights_bytes,
        "activations": reality.activation_bytes,
        "graphs": reality.graph_bytes,
        "non_torch": reality.non_torch_bytes,
        "kv_cache": reality.kv_cache_bytes,
        "num_gpu_blocks": reality.num_gpu_blocks,
        "kv_cache_size_tokens": reality.kv_cache_size_tokens,
        "kv_cache_max_concurrency": reality.kv_cache_max_concurrency,
    }
    return {name: float(figure) for name, figure in figures.items() if figure is not None}


def compare(planned: Mapping[str, float], reality: Reality) -> tuple[Row, ...]:
    """Return a row for each item that was planned and reported, in the order of ITEMS."""
    measured = measured_figures(reality)
    return tuple(
        Row(item, planned[item.name], measured[item.name])
        for item in ITEMS
        if item.name in planned and item.name in measured
    )


def format_value(item: Item, value: float, sign: bool = False) -> str:
    """Return a figure for people."""
    prefix = ("-" if value < 0 else "+") if sign else ""
    if item.in_bytes:
        return prefix + format_bytes(abs(int(value)))
    return prefix + (f"{abs(value):,.0f}" if float(value).is_integer() else f"{abs(value):,.2f}")
