"""What the tests of speed share: an oracle whose ``/metrics`` counts as vLLM's does, and scripted drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from oracle import Oracle, Reply

Draw = Callable[[str, dict[str, Any]], tuple[int, tuple[int, ...]]]


@dataclass
class Counting:
    """Counts requests, tokens and drafts; ``drafts`` scripts what a request adds: (drafts, accepted by position).

    ``others`` is added to the finished requests at each of ours; ``answer`` scripts replies. With ``positions`` 0 the
    server runs without speculative decoding.
    """

    oracle: Oracle
    positions: int = 3
    drafts: Draw | None = None
    answer: Callable[[str, dict[str, Any]], Reply | None] | None = None
    tokens: int = 8
    others: int = 0
    running: int = 0
    kv_usage: float = 0.0
    resident: Callable[[], float] | None = None
    cached: float = 0.0
    finished: int = field(default=100, init=False)
    generated: int = field(default=5000, init=False)
    totals: list[int] = field(default_factory=lambda: [40, 30, 20, 10], init=False)

    def __post_init__(self) -> None:
        self.oracle.respond = self.respond
        self.oracle.metrics = lambda _: self.document()

    def respond(self, path: str, body: dict[str, Any]) -> Reply | None:
        if not path.startswith("/v1"):
            return None
        reply = (self.answer and self.answer(path, body)) or Reply("one two three", tokens=self.tokens)
        if reply.status == 200:
            self.finished += 1 + self.others
            self.generated += reply.tokens or 0
            drafts, accepted = self.drafts(path, body) if self.drafts else (4, (3, 2, 1))
            for index, gained in enumerate((drafts, *accepted)):
                self.totals[index] += gained
        return reply

    def document(self) -> str:
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{engine="0"}} {self.running}',
            "# TYPE vllm:num_requests_waiting gauge",
            'vllm:num_requests_waiting{engine="0"} 0',
            "# TYPE vllm:kv_cache_usage_perc gauge",
            f'vllm:kv_cache_usage_perc{{engine="0"}} {self.kv_usage}',
            "# TYPE vllm:request_success counter",
            f'vllm:request_success_total{{engine="0",finished_reason="length"}} {self.finished - 7}',
            'vllm:request_success_total{engine="0",finished_reason="stop"} 7',
            "# TYPE vllm:generation_tokens counter",
            f'vllm:generation_tokens_total{{engine="0"}} {self.generated}',
            "# TYPE vllm:prefix_cache_hits counter",
            f'vllm:prefix_cache_hits_total{{engine="0"}} {self.cached}',
        ]
        if self.resident:
            lines += ["# TYPE process_resident_memory_bytes gauge", f"process_resident_memory_bytes {self.resident()}"]
        if self.positions:
            name = "vllm:spec_decode_num_accepted_tokens_per_pos"
            lines += [
                "# TYPE vllm:spec_decode_num_drafts counter",
                f"vllm:spec_decode_num_drafts_total {self.totals[0]}",
            ]
            lines.append(f"# TYPE {name} counter")
            lines += [f'{name}_total{{position="{i}"}} {self.totals[i + 1]}' for i in range(self.positions)]
        return "\n".join(lines) + "\n"
