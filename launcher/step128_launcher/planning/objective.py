"""Which of two acceptable candidates is better, by objective. Every key grows with memory, so more is never worse.

"Worse" is by the key: what comes later in it, or not at all, may shrink where something earlier grows. The memory with
which images fit may leave one request where eight ran without them, in a smaller KV cache.

balanced: the longest context up to 200k, then the MTP depth that pays, then images, then concurrency.
context: the same with the model's longest context. latency: 64k tokens, then the fastest single request.
throughput: the most tokens a second with all requests of 32k tokens that fit.
Contexts are compared in 32nds of the wish: a context that is 1 % longer is not worth half the concurrency. Among equal
contexts, the KV dtype that the profile prefers comes first.
"""

from collections.abc import Mapping
from dataclasses import replace

from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.model_config import FULL_ATTENTION
from step128_launcher.planning.candidates import Candidate
from step128_launcher.planning.items import Load
from step128_launcher.planning.memory import Ledger
from step128_launcher.planning.speculation import (
    SHORT_CONTEXT_TOKENS,
    SpeedInputs,
    SpeedRow,
    Traffic,
    speed,
    worthwhile_depth,
)

# The longest context that each objective strives for; None: the model's (or the profile's) own maximum.
WISHED_CONTEXT_TOKENS: Mapping[str, int | None] = {
    "balanced": 204_800,
    "context": None,
    "throughput": 32_768,
    "latency": 65_536,
}
_CONTEXT_STEPS = 32

Key = tuple[float, ...]


class Judge:
    """Ranks candidates; `inputs` None (no speed known) makes the deepest MTP the best."""

    def __init__(
        self,
        objective: str,
        wished_context: int,
        preferred_kv_cache_dtype: str,
        footprint: ModelFootprint,
        ledger: Ledger,
        inputs: SpeedInputs | None,
    ) -> None:
        self.objective, self.wished_context = objective, wished_context
        self.preferred_kv_cache_dtype = preferred_kv_cache_dtype
        self.footprint, self.ledger, self.inputs = footprint, ledger, inputs
        self._traffic: dict[tuple[int, int], Traffic] = {}
        self._rows: dict[tuple[int, int, int, int, int], SpeedRow] = {}

    def key(self, candidate: Candidate, depths: Mapping[tuple[object, ...], int]) -> Key:
        """Return what to maximise; `depths` is from `worthwhile_depths`."""
        load = candidate.load
        steps = float(candidate.context * _CONTEXT_STEPS // self.wished_context)
        start = (steps, float(candidate.kv_cache_dtype == self.preferred_kv_cache_dtype))
        vision = float(load.vision)
        requests, seqs = float(candidate.requests), float(load.max_num_seqs)
        end = (float(load.max_num_batched_tokens), float(candidate.context))
        if self.objective == "throughput":
            together = self._tokens_per_second(candidate, candidate.requests, self.wished_context)
            return (*start, vision, together, requests, seqs, *end)
        if self.objective == "latency":
            return (*start, vision, self._tokens_per_second(candidate, 1), requests, seqs, *end)
        wanted = depths[_depth_group(candidate)]
        depth = load.num_speculative_tokens
        rank = float(depth if depth <= wanted else -depth)
        return (*start, rank, vision, requests, seqs, self._tokens_per_second(candidate, 1), *end)

    def worthwhile_depths(self, candidates: list[Candidate]) -> dict[tuple[object, ...], int]:
        """Return, for each number of ranks and KV dtype, the depth that pays at a short and at the wished context."""
        groups: dict[tuple[object, ...], list[Candidate]] = {}
        for candidate in candidates:
            same = groups.setdefault(_depth_group(candidate), [])
            if all(candidate.load.num_speculative_tokens != other.load.num_speculative_tokens for other in same):
                same.append(candidate)
        return {group: self._worthwhile(same) for group, same in groups.items()}

    def row(self, candidate: Candidate, depth: int, context: int, requests: int = 1) -> SpeedRow | None:
        """Return the modelled speed of `candidate` at another depth, or None if no speed is known."""
        if self.inputs is None:
            return None
        ranks, element = candidate.load.tensor_parallel_size, candidate.shape.bytes_per_element
        key = (ranks, element, depth, context, requests)
        if key not in self._rows:
            if (ranks, element) not in self._traffic:
                self._traffic[ranks, element] = self._traffic_of(candidate.load, element)
            self._rows[key] = speed(self._traffic[ranks, element], self.inputs, ranks, depth, context, requests)
        return self._rows[key]

    def _traffic_of(self, load: Load, kv_bytes_per_element: int) -> Traffic:
        """Return what one decode step reads on one rank."""
        config, ranks = self.footprint.config, load.tensor_parallel_size
        experts = shared = draft = 0
        for part in self.ledger.weights_of(replace(load, num_speculative_tokens=self.footprint.mtp_layers)):
            if part.vision or part.component == "embed_tokens":
                continue  # not read in a decode step, or a few rows of it
            if part.component == "routed_experts":
                experts += part.rank_bytes
            elif part.draft:
                draft += part.rank_bytes
            else:
                shared += part.rank_bytes
        full = sum(kind == FULL_ATTENTION for kind in config.layer_types[: config.num_hidden_layers])
        heads = max(1, config.num_kv_heads // ranks)
        layer_token = 2 * heads * config.head_dim * kv_bytes_per_element
        sliding = config.num_hidden_layers - full
        return Traffic(
            shared_bytes=shared,
            expert_bytes=experts / config.num_experts,
            draft_layer_bytes=draft / max(1, self.footprint.mtp_layers),
            kv_bytes_per_token=full * layer_token,
            kv_window_bytes=sliding * config.sliding_window * layer_token,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            layers=config.num_hidden_layers,
        )

    def _tokens_per_second(self, candidate: Candidate, requests: int, context: int = SHORT_CONTEXT_TOKENS) -> float:
        """Return the modelled speed; by default at a short context, where most of a chat is decoded."""
        if self.inputs is None or requests < 1:
            return 0.0
        row = self.row(candidate, candidate.load.num_speculative_tokens, context, requests)
        return row.tokens_per_second if row else 0.0

    def _worthwhile(self, candidates: list[Candidate]) -> int:
        depths = [candidate.load.num_speculative_tokens for candidate in candidates]
        if self.inputs is None:
            return max(depths)
        short = [self.row(candidates[0], depth, SHORT_CONTEXT_TOKENS) for depth in depths]
        long = [self.row(candidates[0], depth, self.wished_context) for depth in depths]
        return min(worthwhile_depth([row for row in rows if row]) for rows in (short, long))


def _depth_group(candidate: Candidate) -> tuple[object, ...]:
    return candidate.load.tensor_parallel_size, candidate.kv_cache_dtype
