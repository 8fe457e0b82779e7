"""Hardware x ModelFootprint x Profile x the user's limits -> Plan, with the reasons and what was rejected. Pure."""

import math
from collections.abc import Sequence
from dataclasses import replace

from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.quantization import Format
from step128_launcher.planning.budget import Budget, make_budget
from step128_launcher.planning.calibration import Measurement
from step128_launcher.planning.candidates import DIMENSIONS, Candidate, search
from step128_launcher.planning.choices import device_selection, make_space, omp_threads_bind
from step128_launcher.planning.explain import explain_choice, neighbours
from step128_launcher.planning.items import MemoryLine
from step128_launcher.planning.kv_cache import predict
from step128_launcher.planning.measured import finder
from step128_launcher.planning.memory import Ledger
from step128_launcher.planning.objective import Judge
from step128_launcher.planning.plan import Expected, Limits, Plan
from step128_launcher.planning.plan_warnings import plan_warnings
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.remedies import Retry, does_not_fit, unmet_wish
from step128_launcher.planning.speculation import SHORT_CONTEXT_TOKENS, SpeedRow
from step128_launcher.planning.speed_inputs import speed_inputs, speed_sources
from step128_launcher.planning.tables import memory_tables

# After an out-of-memory at the start, budgets smaller than the plan's own sum by this share, twice it, … are tried.
_FALLBACKS, _FALLBACK_SHARE = 3, 0.03


def make_plan(
    hardware: Hardware,
    footprint: ModelFootprint,
    profile: Profile,
    limits: Limits,
    *,
    measurements: Sequence[Measurement] = (),
    form: Format | None = None,
    with_fallbacks: bool = False,
) -> Plan:
    """Choose by `limits.objective`. `form` (the quantization policies) lets a refusal name the policy that would fit.

    `with_fallbacks` also works out leaner plans, for a server that may run out of memory at its start.

    Raises:
        DoesNotFitError: 3, if not even the profile's shortest context (or the length asked for) fits.
        LauncherError: 2, if a limit contradicts the model; 4, if the machine has too few CPUs or GPUs.

    """
    budget = make_budget(hardware, profile, limits)
    planner = _Planner(hardware, footprint, profile, limits, budget, measurements, form)
    try:
        plan = planner.plan(planner.choose(budget), budget)
    except _NothingFitsError:
        raise does_not_fit(
            hardware, footprint, profile, limits, budget, planner.space, planner.ledger, planner.candidates, form
        ) from None
    return replace(plan, fallbacks=planner.fallbacks(plan)) if with_fallbacks else plan


class _NothingFitsError(Exception):
    pass


class _Planner:
    def __init__(
        self,
        hardware: Hardware,
        footprint: ModelFootprint,
        profile: Profile,
        limits: Limits,
        budget: Budget,
        measurements: Sequence[Measurement],
        form: Format | None,
    ) -> None:
        self.hardware, self.footprint, self.profile, self.limits = hardware, footprint, profile, limits
        self.budget, self.form = budget, form
        self.space, self.left_out = make_space(hardware, footprint, profile, limits, budget)
        self.ledger = Ledger(footprint, profile, finder(measurements))
        self.judge = Judge(
            limits.objective,
            self.space.wished_context,
            self.space.kv_cache_dtypes[0],
            footprint,
            self.ledger,
            speed_inputs(footprint, profile, limits),
        )
        self.candidates: list[Candidate] = []
        self.depths: dict[tuple[object, ...], int] = {}

    def choose(self, budget: Budget) -> Candidate:
        """Search, and return the best acceptable candidate."""
        found = search(self.footprint, self.space, budget, self.ledger, self.profile.kv_cache_max_bytes)
        self.candidates = found
        acceptable = [candidate for candidate in found if candidate.reason is None]
        if not acceptable:
            raise _NothingFitsError
        self.depths = self.judge.worthwhile_depths(found)
        return max(acceptable, key=lambda candidate: self.judge.key(candidate, self.depths))

    def plan(self, best: Candidate, budget: Budget) -> Plan:
        """Return the whole plan for the candidate chosen."""
        load, profile, space = best.load, self.profile, self.space
        kv_bytes = self._kv_cache_bytes(best)
        prediction = predict(best.shape, kv_bytes, best.context)
        held = f"{best.kv_cache_dtype}, {prediction.kv_cache_max_concurrency:.1f} requests of {best.context} tokens"
        spare = best.left_bytes - kv_bytes
        shared = "the table above: GPU and host share this memory"
        memory, host_memory = memory_tables(self.hardware, budget, self.ledger, load, kv_bytes, held, shared)
        environment = dict(profile.environment)
        if profile.device == "cpu":
            environment["VLLM_CPU_OMP_THREADS_BIND"] = omp_threads_bind(self.hardware, load.tensor_parallel_size)
        chosen = budget.gpus[: load.tensor_parallel_size]
        environment |= dict(device_selection(self.hardware, chosen))
        return Plan(
            profile=profile.name,
            device=profile.device,
            objective=self.limits.objective,
            max_model_len=best.context,
            num_speculative_tokens=load.num_speculative_tokens,
            kv_cache_dtype=best.kv_cache_dtype,
            max_num_seqs=load.max_num_seqs,
            max_num_batched_tokens=load.max_num_batched_tokens,
            tensor_parallel_size=load.tensor_parallel_size,
            enable_expert_parallel=load.enable_expert_parallel,
            dtype=load.dtype,
            block_size=space.block_size,
            enforce_eager=load.enforce_eager,
            vision=load.vision,
            attention_backend=load.attention_backend,
            gpu_memory_utilization=self._share(best, min(memory.total_bytes, budget.available_bytes), budget),
            measuring_utilization=self._share(best, memory.total_bytes + spare, budget),
            kv_cache_memory_bytes=kv_bytes,
            mm_processor_cache_bytes=profile.mm_processor_cache_bytes if load.vision else 0,
            prediction=prediction,
            environment=tuple(environment.items()),
            arguments=profile.arguments,
            gpu_addresses=tuple(gpu.pci_address for gpu in chosen),
            memory=memory,
            host_memory=host_memory,
            expected=self._expected(best, memory.lines),
            speed=self._speed(best),
            speed_sources=speed_sources(self.judge.inputs),
            reasons=explain_choice(
                best, self.footprint, profile, self.limits, space, self.judge, self.worthwhile(best), self.candidates
            ),
            rejected=(*self.left_out, *neighbours(best, self.candidates, space, self.judge)),
            wish=self._wish(best, budget),
            warnings=plan_warnings(best, self.footprint, profile, self.limits, budget),
            considered=len(self.candidates),
        )

    def fallbacks(self, plan: Plan) -> tuple[Plan, ...]:
        """Return plans for ever smaller budgets, each with other settings than the one before."""
        found: list[Plan] = []
        seen = {_settings(plan)}
        for step in range(1, 3 * _FALLBACKS + 1):
            share = 1 - step * _FALLBACK_SHARE
            budget = replace(self.budget, budget_bytes=int(share * plan.memory.total_bytes))
            try:
                leaner = self.plan(self.choose(budget), budget)
            except _NothingFitsError:
                break
            if _settings(leaner) not in seen:
                seen.add(_settings(leaner))
                found.append(leaner)
            if len(found) == _FALLBACKS:
                break
        return tuple(found)

    def _wish(self, best: Candidate, budget: Budget) -> tuple[str, ...]:
        again = Retry(self.footprint, self.profile, budget, self.ledger, self.form)
        return unmet_wish(self.hardware, self.space, self.worthwhile(best), self.limits, again)

    def worthwhile(self, best: Candidate) -> int:
        """Return the MTP depth that pays by the speed model, with the ranks chosen and the preferred KV dtype."""
        return self.depths[best.load.tensor_parallel_size, self.space.kv_cache_dtypes[0]]

    def _kv_cache_bytes(self, best: Candidate) -> int:
        """Return the KV cache of a rank: all that is left, in whole blocks, up to max_num_seqs full-length requests."""
        most = best.shape.needed_bytes(best.context, best.load.max_num_seqs)
        return min(most, best.left_bytes // best.shape.bytes_per_block * best.shape.bytes_per_block)

    def _expected(self, best: Candidate, lines: Sequence[MemoryLine]) -> Expected:
        if not self.budget.gpus:
            return Expected(self.ledger.weights_bytes(best.load), 0, 0, 0)
        sizes = {line.name: line.total_bytes for line in lines}
        return Expected(
            weights_bytes=self.ledger.weights_bytes(best.load) + sizes.get("rope tables", 0),
            activation_bytes=sizes.get("activations", 0) + sizes.get("logits", 0),
            graph_bytes=sizes.get("graphs", 0),
            non_torch_bytes=self.ledger.runtime_bytes(best.load),
        )

    def _share(self, best: Candidate, wanted_bytes: int, budget: Budget) -> float | None:
        if not budget.gpus:
            return None
        runtime = self.ledger.runtime_bytes(best.load) + (self.ledger.host_bytes(best.load) if budget.shared else 0)
        return round(_utilization(wanted_bytes, runtime, budget.total_bytes), 2)

    def _speed(self, best: Candidate) -> tuple[SpeedRow, ...]:
        """Return the modelled speed of every depth the checkpoint allows, at a short and at the planned context."""
        depths = range(min(self.footprint.mtp_layers, 3) + 1)
        contexts = sorted({min(SHORT_CONTEXT_TOKENS, best.context), best.context})
        rows = (self.judge.row(best, depth, context) for context in contexts for depth in depths)
        return tuple(row for row in rows if row is not None)


def _utilization(wanted_bytes: int, runtime_bytes: int, total_bytes: int) -> float:
    """Return --gpu-memory-utilization, in whole hundredths, rounded down.

    vLLM looks at the free memory once its runtime context and collectives exist (`runtime_bytes`), and refuses to start
    if less than this share of the total is free, even when the KV cache's size is given (v1/worker/gpu_worker.py,
    request_memory). So what the runtime takes is no part of it, and a hundredth is kept for what nobody counted.
    """
    return max(0.01, math.floor(100 * (wanted_bytes - runtime_bytes) / total_bytes) / 100 - 0.01)


def _settings(plan: Plan) -> tuple[object, ...]:
    return (
        *(plan.max_model_len, plan.num_speculative_tokens, plan.kv_cache_dtype, plan.max_num_seqs),
        *(plan.max_num_batched_tokens, plan.tensor_parallel_size, plan.vision, plan.kv_cache_memory_bytes),
    )


def all_candidates(
    hardware: Hardware,
    footprint: ModelFootprint,
    profile: Profile,
    limits: Limits,
    measurements: Sequence[Measurement] = (),
) -> list[dict[str, object]]:
    """Return every candidate of the search as a document: its settings, context, requests, reason, missing bytes."""
    budget = make_budget(hardware, profile, limits)
    planner = _Planner(hardware, footprint, profile, limits, budget, measurements, None)
    found = search(footprint, planner.space, budget, planner.ledger, profile.kv_cache_max_bytes)
    return [
        {name: candidate.value(name) for name in DIMENSIONS}
        | {
            "max_model_len": candidate.context,
            "requests": candidate.requests,
            "reason": candidate.reason,
            "missing_bytes": candidate.missing_bytes,
        }
        for candidate in found
    ]
