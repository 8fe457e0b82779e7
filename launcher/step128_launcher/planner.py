"""Hardware x ModelFootprint x Profile x the user's limits -> Plan, with the reasons and what was rejected. Pure."""

from dataclasses import dataclass, replace

from step128_launcher.checkpoint import ModelFootprint
from step128_launcher.choices import (
    block_size_tokens,
    kv_cache_dtype,
    memory_shortage,
    omp_threads_bind,
    tensor_parallel_size,
    usage_error,
)
from step128_launcher.kv_cache import KvShape, kv_shape, longest_context, predict
from step128_launcher.machine.types import Hardware
from step128_launcher.memory import DTYPE_BYTES, Load, MemoryLine, MemoryPlan, fixed_lines, kv_line
from step128_launcher.plan import Alternative, DoesNotFitError, Limits, Plan
from step128_launcher.profiles import Profile
from step128_launcher.sizes import format_bytes

# vLLM turns async scheduling off on a CPU, so one batch is in flight.
_CPU_CONCURRENT_BATCHES = 1


def make_plan(hardware: Hardware, footprint: ModelFootprint, profile: Profile, limits: Limits) -> Plan:
    """Choose the longest context that fits, then the deepest MTP, then the most concurrent requests.

    Raises:
        DoesNotFitError: 3, if not even the profile's shortest context (or the length asked for) fits.
        LauncherError: 2, if a limit contradicts the model; 4, if the machine has too few CPUs.

    """
    return _Planner(hardware, footprint, profile, limits).plan()


@dataclass(frozen=True)
class _Candidate:
    load: Load
    shape: KvShape
    lines: tuple[MemoryLine, ...]
    left_per_rank_bytes: int
    context: int


class _Planner:
    def __init__(self, hardware: Hardware, footprint: ModelFootprint, profile: Profile, limits: Limits) -> None:
        self.hardware, self.footprint, self.profile, self.limits = hardware, footprint, profile, limits
        self.reasons: list[str] = []
        self.rejected: list[Alternative] = []
        share = int(hardware.memory_available_bytes * profile.usable_fraction)
        self.budget_bytes = share if limits.memory_bytes is None else limits.memory_bytes

    def plan(self) -> Plan:
        limits, profile = self.limits, self.profile
        ranks = tensor_parallel_size(self.hardware, self.footprint, profile, limits)
        block_size = block_size_tokens(self.footprint, profile, limits)
        kv_dtype, why, refused = kv_cache_dtype(self.footprint, profile, limits)
        self.reasons.append(why)
        self.rejected += refused
        ceiling = self.context_ceiling()
        load = Load(
            dtype=limits.dtype or profile.dtype,
            tensor_parallel_size=ranks,
            num_speculative_tokens=0,
            max_num_seqs=limits.max_num_seqs or profile.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens or profile.max_num_batched_tokens,
        )
        if load.max_num_batched_tokens < load.max_num_seqs:
            raise usage_error(
                f"--max-num-batched-tokens {load.max_num_batched_tokens} is below "
                f"--max-num-seqs {load.max_num_seqs}; vLLM schedules at least one token a request."
            )
        element = 1 if kv_dtype == "fp8" else DTYPE_BYTES[load.dtype]
        candidates = [
            self.candidate(replace(load, num_speculative_tokens=depth), element, block_size, ceiling)
            for depth in self.depths()
        ]
        best = max(candidates, key=lambda candidate: (candidate.context, candidate.load.num_speculative_tokens))
        shortest = min(ceiling, limits.max_model_len or profile.min_model_len)
        if best.context < shortest:
            raise self.does_not_fit(candidates[-1], shortest)
        self.explain_context(best, ceiling)
        self.explain_depth(best, candidates, kv_dtype)
        kv_bytes, requests = self.kv_cache_bytes(best)
        cached = f"{kv_dtype}, {requests} request{'s' if requests != 1 else ''} of {best.context} tokens"
        return Plan(
            profile=profile.name,
            max_model_len=best.context,
            num_speculative_tokens=best.load.num_speculative_tokens,
            kv_cache_dtype=kv_dtype,
            max_num_seqs=best.load.max_num_seqs,
            max_num_batched_tokens=best.load.max_num_batched_tokens,
            tensor_parallel_size=ranks,
            dtype=best.load.dtype,
            block_size=block_size,
            enforce_eager=profile.enforce_eager if limits.enforce_eager is None else limits.enforce_eager,
            kv_cache_memory_bytes=kv_bytes,
            mm_processor_cache_bytes=profile.mm_processor_cache_bytes,
            prediction=predict(best.shape, kv_bytes, best.context),
            omp_threads_bind=omp_threads_bind(self.hardware, ranks),
            memory=self.memory_plan((*best.lines, kv_line(kv_bytes, ranks, cached))),
            reasons=tuple(self.reasons),
            rejected=tuple(self.rejected),
            warnings=tuple(filter(None, [memory_shortage(self.hardware, limits.memory_bytes)])),
        )

    def context_ceiling(self) -> int:
        """Return the longest context to consider: the model's, the profile's or the user's."""
        model_max = self.footprint.config.max_position_embeddings
        asked = self.limits.max_model_len
        if asked is not None and asked > model_max:
            raise usage_error(f"--max-model-len {asked} is above the model's own maximum of {model_max} tokens.")
        return asked or min(model_max, self.profile.max_model_len)

    def depths(self) -> list[int]:
        """Return the MTP depths to try, deepest first."""
        present, asked = self.footprint.mtp_layers, self.limits.num_speculative_tokens
        if asked is not None:
            if asked > present:
                raise usage_error(
                    f"--num-speculative-tokens {asked} needs as many MTP layers; the checkpoint has {present}.",
                )
            return [asked]
        deepest = min(present, self.profile.num_speculative_tokens)
        if deepest < self.profile.num_speculative_tokens:
            wish = f"num_speculative_tokens {self.profile.num_speculative_tokens}"
            self.rejected.append(Alternative(wish, f"the checkpoint has {present} MTP layers"))
        return list(range(deepest, -1, -1))

    def candidate(self, load: Load, element: int, block_size: int, ceiling: int) -> _Candidate:
        lines = fixed_lines(self.footprint, self.profile, load)
        left = (self.budget_bytes - sum(line.total_bytes for line in lines)) // load.tensor_parallel_size
        shape = kv_shape(
            self.footprint.config,
            mtp_layers=self.footprint.mtp_layers,
            num_speculative_tokens=load.num_speculative_tokens,
            tensor_parallel_size=load.tensor_parallel_size,
            bytes_per_element=element,
            block_size_tokens=block_size,
            max_num_batched_tokens=load.max_num_batched_tokens,
            concurrent_batches=_CPU_CONCURRENT_BATCHES,
        )
        cap = self.profile.kv_cache_max_bytes // load.tensor_parallel_size
        context = longest_context(shape, min(left, cap), ceiling)
        # A whole number of blocks wastes nothing; a length that was asked for, or the ceiling, stays as it is.
        return _Candidate(load, shape, lines, left, context if context == ceiling else context - context % block_size)

    def kv_cache_bytes(self, best: _Candidate) -> tuple[int, int]:
        """Return the cache's bytes per rank, for as many full-length requests as fit, up to max_num_seqs."""
        available = min(best.left_per_rank_bytes, self.profile.kv_cache_max_bytes // best.load.tensor_parallel_size)
        one = best.shape.blocks_per_request(best.context)
        fitting = (available // best.shape.bytes_per_block - 1) // one
        requests = min(best.load.max_num_seqs, fitting)
        if requests < best.load.max_num_seqs:
            self.rejected.append(
                Alternative(
                    f"KV cache for {best.load.max_num_seqs} requests of full length",
                    f"needs {format_bytes(best.shape.needed_bytes(best.context, best.load.max_num_seqs))} a rank, "
                    f"{format_bytes(available)} available; shorter requests still run at once",
                )
            )
        return best.shape.needed_bytes(best.context, requests), requests

    def explain_context(self, best: _Candidate, ceiling: int) -> None:
        if self.limits.max_model_len is not None:
            self.reasons.append(f"Context {best.context}: asked for.")
        elif best.context < ceiling:
            self.reasons.append(f"Context {best.context}: the longest of which one request fits into the memory left.")
            available = min(best.left_per_rank_bytes, self.profile.kv_cache_max_bytes // best.load.tensor_parallel_size)
            self.rejected.append(
                Alternative(
                    f"context {ceiling}",
                    f"needs {format_bytes(best.shape.needed_bytes(ceiling))} of KV cache a rank, "
                    f"{format_bytes(available)} available",
                )
            )
        elif ceiling == self.footprint.config.max_position_embeddings:
            self.reasons.append(f"Context {best.context}: the model's own maximum, and it fits.")
        else:
            self.reasons.append(f"Context {best.context}: the maximum of profile {self.profile.name}, and it fits.")

    def explain_depth(self, best: _Candidate, candidates: list[_Candidate], kv_dtype: str) -> None:
        depth = best.load.num_speculative_tokens
        if self.limits.num_speculative_tokens is not None:
            self.reasons.append(f"MTP depth {depth}: asked for.")
        elif depth:
            self.reasons.append(f"MTP depth {depth}: the checkpoint has {self.footprint.mtp_layers} MTP layers.")
        else:
            self.reasons.append("No MTP.")
        if depth and kv_dtype == "fp8" and self.footprint.unscaled_layers:
            self.reasons.append("The MTP layers' KV cache uses scale 1.0: the checkpoint has no scales for them.")
        for candidate in candidates:
            if candidate.load.num_speculative_tokens > depth:
                wish = f"num_speculative_tokens {candidate.load.num_speculative_tokens}"
                reason = f"would leave a context of {candidate.context} tokens instead of {best.context}"
                self.rejected.append(Alternative(wish, reason))

    def memory_plan(self, lines: tuple[MemoryLine, ...]) -> MemoryPlan:
        return MemoryPlan(lines, self.hardware.memory_available_bytes, self.budget_bytes)

    def does_not_fit(self, leanest: _Candidate, context: int) -> DoesNotFitError:
        needed = leanest.shape.needed_bytes(context)
        kv = kv_line(needed, leanest.load.tensor_parallel_size, f"one request of {context} tokens")
        memory = self.memory_plan((*leanest.lines, kv))
        cap = self.profile.kv_cache_max_bytes // leanest.load.tensor_parallel_size
        if memory.free_bytes >= 0:
            what = (
                f"one request needs {format_bytes(needed)} of KV cache a rank; the profile allows {format_bytes(cap)}"
            )
        else:
            what = (
                f"needs {format_bytes(memory.total_bytes)}, {format_bytes(self.budget_bytes)} may be used "
                f"({format_bytes(-memory.free_bytes)} missing)"
            )
        message = f"{self.footprint.path} does not fit with a context of {context} tokens: {what}."
        return DoesNotFitError(message, self.remedies(leanest, memory.free_bytes < 0, needed > cap), memory)

    def remedies(self, leanest: _Candidate, memory_binds: bool, cap_binds: bool) -> str:
        """Return what would make it fit, most useful first."""
        limits, profile = self.limits, self.profile
        ideas = []
        if limits.max_model_len and leanest.context >= profile.min_model_len:
            ideas.append(f"--max-model-len {leanest.context}")
        for flag, asked, usual in (
            ("--block-size", limits.block_size, profile.block_size),
            ("--max-num-batched-tokens", limits.max_num_batched_tokens, profile.max_num_batched_tokens),
            ("--max-num-seqs", limits.max_num_seqs, profile.max_num_seqs),
        ):
            if asked is not None and asked > usual:
                ideas.append(f"{flag} {usual} (as in profile {profile.name})")
        if leanest.load.num_speculative_tokens:
            ideas.append("--num-speculative-tokens 0")
        if leanest.load.dtype != "bfloat16":
            ideas.append("--dtype bfloat16")
        if self.footprint.quantization is None:
            ideas.append("quantize the checkpoint (step128-checkpoint quantize)")
        if cap_binds:
            ideas.append(
                f"a memory.kv_cache_max above {format_bytes(profile.kv_cache_max_bytes)} in {profile.name}.yaml"
            )
        if memory_binds:
            room = limits.memory_bytes is not None and limits.memory_bytes < self.hardware.memory_available_bytes
            ideas.append("raise --memory" if room else "free memory on this machine")
        return "Try: " + "; ".join(ideas) + "."
