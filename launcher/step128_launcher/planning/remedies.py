"""When nothing fits: how much is missing, and what would make it fit, each remedy tried before it is named."""

from collections.abc import Sequence
from dataclasses import replace

from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint, requantized
from step128_launcher.model.quantization import Format
from step128_launcher.model.weights import indivisible
from step128_launcher.planning.budget import HOST_MEMORY, Budget
from step128_launcher.planning.candidates import Candidate, Space, search
from step128_launcher.planning.items import MemoryPlan
from step128_launcher.planning.memory import Ledger
from step128_launcher.planning.more_memory import more_memory
from step128_launcher.planning.plan import Alternative, DoesNotFitError, Limits
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.tables import memory_tables
from step128_launcher.sizes import format_bytes

_SHOWN_NEAR = 3  # candidates shown of those that came nearest


def does_not_fit(
    hardware: Hardware,
    footprint: ModelFootprint,
    profile: Profile,
    limits: Limits,
    budget: Budget,
    space: Space,
    ledger: Ledger,
    candidates: Sequence[Candidate],
    form: Format | None,
) -> DoesNotFitError:
    """Return the refusal: what the leanest candidate lacks, and the remedies that would help."""
    leanest = min(candidates, key=lambda one: (one.missing_bytes is None, one.missing_bytes or 0))
    context = space.shortest_context
    needed = leanest.shape.needed_bytes(context)
    memory, host_memory = _memory(hardware, leanest, ledger, budget, needed, context)
    if leanest.missing_bytes is None:
        what = leanest.reason or "no combination of settings is possible"
        if leanest.left_bytes < needed:
            cap = (profile.kv_cache_max_bytes or 0) // leanest.load.tensor_parallel_size
            what = (
                f"one request needs {format_bytes(needed)} of KV cache a rank; the profile allows {format_bytes(cap)}"
            )
    else:
        what = (
            f"needs {format_bytes(memory.total_bytes)} of {memory.where}, {format_bytes(memory.budget_bytes)} may be "
            f"used ({format_bytes(leanest.missing_bytes)} missing)"
        )
    message = f"{footprint.path} does not fit with a context of {context} tokens: {what}."
    search_again = Retry(footprint, profile, budget, ledger, form)
    ideas = _ideas(hardware, limits, space, leanest, leanest.lacking == HOST_MEMORY, search_again)
    hint = ("Try: " + "; ".join(ideas) + "." if ideas else "") + (f" {profile.advice}" if profile.advice else "")
    near: dict[tuple[object, ...], Candidate] = {}
    for one in sorted((one for one in candidates if one.missing_bytes), key=lambda one: one.missing_bytes or 0):
        near.setdefault((one.load.vision, one.load.num_speculative_tokens, one.kv_cache_dtype), one)
    rejected = tuple(
        Alternative(_describe(one), one.reason or "", one.missing_bytes) for one in list(near.values())[:_SHOWN_NEAR]
    )
    remedies = (*ideas, profile.advice) if profile.advice else tuple(ideas)
    return DoesNotFitError(message, hint.strip(), memory, rejected, host_memory, remedies)


def unmet_wish(hardware: Hardware, space: Space, depth: int, limits: Limits, again: "Retry") -> tuple[str, ...]:
    """Return what the wished plan lacks, if the chosen one is short of it, and each single change that would give it.

    The wish: images, the wished context, the MTP depth that pays (`depth`), the preferred KV dtype.
    """
    wish = replace(
        space,
        vision=(True,) if True in space.vision else (False,),
        depths=(depth,),
        kv_cache_dtypes=space.kv_cache_dtypes[:1],
        shortest_context=space.wished_context,
        max_num_seqs=(min(space.max_num_seqs),),
        attention_backends=space.attention_backends[:1],
    )
    found = again.candidates(wish)
    if any(candidate.reason is None for candidate in found):
        return ()
    nearest = min(found, key=lambda one: (one.missing_bytes is None, one.missing_bytes or 0))
    if nearest.missing_bytes is None:
        return ()
    images = "images, " if wish.vision == (True,) else ""
    title = (
        f"Wished: {images}context {space.wished_context}, MTP {depth}, KV {wish.kv_cache_dtypes[0]}: "
        f"{format_bytes(nearest.missing_bytes)} missing ({nearest.lacking}). It would fit with"
    )
    return (f"{title} {'; or '.join(_changes(wish, nearest, hardware, limits, again))}.",)


def _memory(
    hardware: Hardware, leanest: Candidate, ledger: Ledger, budget: Budget, needed: int, context: int
) -> tuple[MemoryPlan, MemoryPlan | None]:
    """Return the table of the pool that lacks memory, and the host's where that is another one."""
    note = f"one request of {context} tokens"
    pool, host = memory_tables(hardware, budget, ledger, leanest.load, needed, note, "GPU and host share it")
    return (host, None) if host is not None and leanest.lacking == HOST_MEMORY else (pool, host)


class Retry:
    """Searches again, with something changed, on the same machine."""

    def __init__(
        self, footprint: ModelFootprint, profile: Profile, budget: Budget, ledger: Ledger, form: Format | None
    ) -> None:
        self.footprint, self.profile, self.budget, self.ledger, self.form = footprint, profile, budget, ledger, form

    def candidates(self, space: Space, footprint: ModelFootprint | None = None) -> list[Candidate]:
        """Return every candidate of `space`, of another checkpoint if one is given."""
        ledger = self.ledger if footprint is None else Ledger(footprint, self.profile)
        return search(footprint or self.footprint, space, self.budget, ledger, self.profile.kv_cache_max_bytes)

    def best(self, space: Space, footprint: ModelFootprint | None = None) -> Candidate | None:
        """Return the acceptable candidate with the longest context."""
        good = [candidate for candidate in self.candidates(space, footprint) if candidate.reason is None]
        return max(good, key=lambda one: one.context, default=None)


def _ideas(
    hardware: Hardware, limits: Limits, space: Space, leanest: Candidate, host_lacks: bool, again: Retry
) -> list[str]:
    """Return remedies, most useful first; those that change the search are tried on it first."""
    profile, footprint = again.profile, again.footprint
    ideas = _shorter(limits, space, profile, again)
    ideas += _usual(limits, profile)
    if limits.tensor_parallel_size and again.profile.device != "cpu":
        sizes = tuple(size for size in profile.tensor_parallel_sizes if size <= len(again.budget.gpus))
        other = again.best(replace(space, tensor_parallel_sizes=_divisible(again.footprint, sizes, limits)))
        ideas += _named(f"--tensor-parallel-size {other.load.tensor_parallel_size}" if other else "", other)
    if limits.vision:
        ideas += _named("--no-vision", again.best(replace(space, vision=(False,))))
    if limits.num_speculative_tokens:
        ideas += _named("--num-speculative-tokens 0", again.best(replace(space, depths=(0,))))
    if limits.kv_cache_dtype == "auto" and footprint.kv_scales is not None and footprint.quantization is not None:
        ideas += _named("--kv-cache-dtype fp8", again.best(replace(space, kv_cache_dtypes=("fp8",))))
    ideas += _other_policies(space, leanest, again)
    if space.dtype != "bfloat16":
        ideas += ["--dtype bfloat16"]
    if profile.kv_cache_max_bytes is not None and leanest.missing_bytes is None:
        ideas.append(f"a memory.kv_cache_max above {format_bytes(profile.kv_cache_max_bytes)} in {profile.name}.yaml")
    if leanest.missing_bytes is not None:
        ideas += more_memory(hardware, limits, profile, again.budget, leanest.missing_bytes, host_lacks)
    return ideas


def _changes(wish: Space, nearest: Candidate, hardware: Hardware, limits: Limits, again: Retry) -> list[str]:
    """Return the single changes that make the wish fit, each with the memory it frees on a rank."""
    before = nearest.left_bytes
    # The other settings stay those of the nearest, so that what a change frees is compared like with like.
    load = nearest.load
    wish = replace(
        wish,
        tensor_parallel_sizes=(load.tensor_parallel_size,),
        max_num_batched_tokens=(load.max_num_batched_tokens,),
    )
    found = []
    if wish.vision == (True,) and limits.vision is not True:
        other = again.best(replace(wish, vision=(False,)))
        if other:
            found.append(f"text only (--no-vision): +{format_bytes(other.left_bytes - before)}")
    if wish.depths != (0,) and limits.num_speculative_tokens is None:
        other = again.best(replace(wish, depths=(0,)))
        if other:
            found.append(f"no MTP (--num-speculative-tokens 0): +{format_bytes(other.left_bytes - before)}")
    found += _other_policies(wish, nearest, again)
    missing, host_lacks = nearest.missing_bytes or 0, nearest.lacking == HOST_MEMORY
    return found + more_memory(hardware, limits, again.profile, again.budget, missing, host_lacks)


def _shorter(limits: Limits, space: Space, profile: Profile, again: Retry) -> list[str]:
    if not limits.max_model_len:
        return []
    best = again.best(replace(space, shortest_context=min(profile.min_model_len, limits.max_model_len)))
    return [f"--max-model-len {best.context}"] if best else []


def _divisible(footprint: ModelFootprint, sizes: tuple[int, ...], limits: Limits) -> tuple[int, ...]:
    experts = limits.enable_expert_parallel
    return tuple(size for size in sizes if indivisible(footprint, size, expert_parallel=experts) is None)


def _usual(limits: Limits, profile: Profile) -> list[str]:
    """Return the profile's own figure for each limit that was asked for above it."""
    found = []
    for flag, asked, usual in (
        ("--block-size", limits.block_size, profile.block_size),
        ("--max-num-batched-tokens", limits.max_num_batched_tokens, profile.max_num_batched_tokens),
        ("--max-num-seqs", limits.max_num_seqs, profile.max_num_seqs),
    ):
        if asked is not None and asked > usual:
            found.append(f"{flag} {usual} (as in profile {profile.name})")
    return found


def _named(what: str, candidate: Candidate | None) -> list[str]:
    return [f"{what} (fits, with a context of {candidate.context})"] if candidate else []


def _other_policies(space: Space, leanest: Candidate, again: Retry) -> list[str]:
    """Return the quantization policies with which it fits, each with what it saves on a rank."""
    form, footprint = again.form, again.footprint
    if form is None:
        return [] if footprint.quantization else ["quantize the checkpoint (step128-checkpoint quantize)"]
    found: list[str] = []
    now = again.ledger.weights_bytes(leanest.load)
    quantized = footprint.quantization is not None
    if footprint.quantization is not None and footprint.quantization.method != form.name:
        return []  # made with another tool: its weights were not these to begin with
    # Whether it fits is decided by the leanest settings; the others need not be tried.
    lean = replace(
        space, max_num_seqs=(min(space.max_num_seqs),), max_num_batched_tokens=(min(space.max_num_batched_tokens),)
    )
    for policy in form.policies:
        other = requantized(footprint, form, policy)
        saved = now - Ledger(other, again.profile).weights_bytes(leanest.load)
        if saved * again.ledger.ranks_in_pool(leanest.load) < max(1, leanest.missing_bytes or 0):
            continue
        best = again.best(lean if quantized else replace(lean, kv_cache_dtypes=("fp8", "auto")), other)
        if best is not None:
            found.append(f"policy {policy}: +{format_bytes(saved)} a rank (fits, with a context of {best.context})")
    if not found and not quantized:
        found.append("quantize the checkpoint (step128-checkpoint quantize): not enough by itself")
    return found


def _describe(candidate: Candidate) -> str:
    load = candidate.load
    return (
        f"tensor parallel {load.tensor_parallel_size}, MTP {load.num_speculative_tokens}, "
        f"KV {candidate.kv_cache_dtype}, {load.max_num_seqs} at once, {load.max_num_batched_tokens} tokens a step, "
        f"{'with images' if load.vision else 'text only'}"
    )
