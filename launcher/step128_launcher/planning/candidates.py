"""The search: every combination of settings, each kept with the context it allows, or rejected with the reason."""

import itertools
from dataclasses import dataclass, replace

from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.budget import Budget
from step128_launcher.planning.items import DTYPE_BYTES, Load
from step128_launcher.planning.kv_cache import KvShape, kv_shape, longest_context
from step128_launcher.planning.memory import Ledger
from step128_launcher.planning.profile_schema import AttentionBackend
from step128_launcher.sizes import format_bytes

# Settings whose neighbours are explained, in this order.
DIMENSIONS = (
    "vision",
    "kv_cache_dtype",
    "num_speculative_tokens",
    "tensor_parallel_size",
    "attention_backend",
    "max_num_batched_tokens",
    "max_num_seqs",
)


@dataclass(frozen=True)
class Space:
    """The values to combine, and what is the same for all; contexts in tokens.

    `wished_context` is the longest worth having, `shortest_context` the least that makes a candidate acceptable.
    """

    dtype: str
    block_size: int
    enforce_eager: bool
    enable_expert_parallel: bool
    concurrent_batches: int
    wished_context: int
    shortest_context: int
    tensor_parallel_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    kv_cache_dtypes: tuple[str, ...]
    max_num_seqs: tuple[int, ...]
    max_num_batched_tokens: tuple[int, ...]
    vision: tuple[bool, ...]
    attention_backends: tuple[AttentionBackend | None, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One combination. `context` is the longest of which one request fits, `requests` how many of that length do.

    `reason` is None if it is acceptable; if memory is the reason, `missing_bytes` is what the shortest context lacks,
    and `lacking` of which memory.
    """

    load: Load
    kv_cache_dtype: str
    shape: KvShape
    left_bytes: int
    context: int
    requests: int
    reason: str | None
    missing_bytes: int | None
    lacking: str | None = None

    def value(self, dimension: str) -> object:
        """Return the candidate's setting of that name."""
        return self.kv_cache_dtype if dimension == "kv_cache_dtype" else getattr(self.load, dimension)

    def without(self, dimension: str) -> tuple[object, ...]:
        """Return all settings but one: equal for neighbours."""
        return tuple(self.value(name) for name in DIMENSIONS if name != dimension)


def search(
    footprint: ModelFootprint, space: Space, budget: Budget, ledger: Ledger, kv_cache_max_bytes: int | None
) -> list[Candidate]:
    """Return every combination of `space`, judged."""
    shapes: dict[tuple[object, ...], KvShape] = {}
    found: list[Candidate] = []
    for ranks, depth, kv_dtype, batched, vision, backend in itertools.product(
        space.tensor_parallel_sizes,
        space.depths,
        space.kv_cache_dtypes,
        space.max_num_batched_tokens,
        space.vision,
        space.attention_backends,
    ):
        key = (ranks, depth, kv_dtype, batched)
        if key not in shapes:
            shapes[key] = kv_shape(
                footprint.config,
                mtp_layers=footprint.mtp_layers,
                num_speculative_tokens=depth,
                tensor_parallel_size=ranks,
                bytes_per_element=1 if kv_dtype == "fp8" else DTYPE_BYTES[space.dtype],
                block_size_tokens=space.block_size,
                max_num_batched_tokens=batched,
                concurrent_batches=space.concurrent_batches,
            )
        load = Load(
            dtype=space.dtype,
            tensor_parallel_size=ranks,
            num_speculative_tokens=depth,
            max_num_seqs=0,
            max_num_batched_tokens=batched,
            vision=vision,
            attention_backend=backend.name if backend else None,
            enable_expert_parallel=space.enable_expert_parallel,
            enforce_eager=space.enforce_eager,
        )
        judge = _Judgement(load, kv_dtype, shapes[key], space, budget, ledger, kv_cache_max_bytes)
        ceiling, unfit = space.wished_context, None
        if backend is not None:
            ceiling, unfit = _backend_limits(backend, kv_dtype, space)
        found += [judge.candidate(seqs, ceiling, unfit) for seqs in space.max_num_seqs]
    return found


class _Judgement:
    """Judges the combinations that differ in max_num_seqs only: what does not depend on it is worked out once."""

    def __init__(
        self,
        load: Load,
        kv_dtype: str,
        shape: KvShape,
        space: Space,
        budget: Budget,
        ledger: Ledger,
        kv_cache_max_bytes: int | None,
    ) -> None:
        self.load, self.kv_dtype, self.shape = load, kv_dtype, shape
        self.space, self.budget, self.ledger = space, budget, ledger
        self.ranks_in_pool = ledger.ranks_in_pool(load)
        # Of no sequence at all: a measurement is of some number of them, and speaks for that number only.
        none = replace(load, max_num_seqs=0)
        self.fixed_bytes, self.host_bytes = ledger.total_bytes(none), ledger.host_bytes(none)
        self.sequence_bytes = ledger.bytes_per_sequence(load)
        self.cap_bytes = None if kv_cache_max_bytes is None else kv_cache_max_bytes // load.tensor_parallel_size
        self.bytes_per_block = shape.bytes_per_block

    def candidate(self, seqs: int, ceiling: int, reason: str | None) -> Candidate:
        """Return one combination with its context and verdict."""
        load, shape, space = replace(self.load, max_num_seqs=seqs), self.shape, self.space
        fixed = self.fixed_bytes + seqs * self.sequence_bytes
        if self.ledger.is_measured(load):
            fixed = self.ledger.total_bytes(load)
        memory_left = self.budget.left_bytes(fixed, self.host_bytes) // self.ranks_in_pool
        left = memory_left if self.cap_bytes is None else min(memory_left, self.cap_bytes)
        if load.max_num_batched_tokens < seqs:
            reason = f"max_num_batched_tokens {load.max_num_batched_tokens} is below max_num_seqs {seqs}"
        context = longest_context(shape, left, ceiling)
        if context != ceiling:
            # A whole number of blocks wastes nothing; a length that was asked for, or the ceiling, stays as it is.
            context -= context % space.block_size
        missing = lacking = None
        if reason is None and context < space.shortest_context:
            needed = shape.needed_bytes(space.shortest_context)
            if memory_left < needed:
                missing = (needed - memory_left) * self.ranks_in_pool
                lacking = self.budget.lacking(
                    fixed + needed * self.ranks_in_pool, self.host_bytes, load.tensor_parallel_size
                )
                reason = f"{format_bytes(missing)} missing ({lacking}) for a context of {space.shortest_context}"
            else:
                reason = f"the profile's largest KV cache does not hold a context of {space.shortest_context}"
        requests = 0
        if context:
            requests = min(seqs, (left // self.bytes_per_block - 1) // shape.blocks_per_request(context))
        return Candidate(load, self.kv_dtype, shape, left, context, requests, reason, missing, lacking)


def _backend_limits(backend: AttentionBackend, kv_dtype: str, space: Space) -> tuple[int, str | None]:
    """Return the longest context the backend is fit for, and why it is not fit at all."""
    if backend.kv_cache_dtypes and kv_dtype not in backend.kv_cache_dtypes:
        return space.wished_context, f"{backend.name} is not for kv_cache_dtype {kv_dtype}: {backend.why}"
    if backend.max_model_len is None or backend.max_model_len >= space.wished_context:
        return space.wished_context, None
    if backend.max_model_len < space.shortest_context:
        return space.wished_context, f"{backend.name} is not for a context of {space.shortest_context}: {backend.why}"
    return backend.max_model_len, None
