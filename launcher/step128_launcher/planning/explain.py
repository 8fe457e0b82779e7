"""Why the chosen candidate was chosen, and what each other value of one setting would have meant."""

from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.candidates import DIMENSIONS, Candidate, Space
from step128_launcher.planning.objective import Judge
from step128_launcher.planning.plan import Alternative, Limits
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.speculation import SHORT_CONTEXT_TOKENS, TIE
from step128_launcher.sizes import format_bytes

# The verdict on a candidate that differs in nothing a person would weigh.
RANKS_BELOW = "fits; ranks below by the objective"


def explain_choice(
    best: Candidate,
    footprint: ModelFootprint,
    profile: Profile,
    limits: Limits,
    space: Space,
    judge: Judge,
    worthwhile: int,
    candidates: list[Candidate],
) -> tuple[str, ...]:
    """Return one sentence for each setting that was decided; `worthwhile` is the depth that pays by the speed model."""
    sentences = [
        f"Objective {limits.objective}: strives for a context of {space.wished_context}.",
        _context(best, footprint, profile, limits, space),
        _depth(best, footprint, limits, judge, worthwhile),
        _kv_dtype(best, footprint, limits),
    ]
    if len(space.tensor_parallel_sizes) > 1:
        sentences.append(_ranks(best, candidates))
    if not best.load.vision:
        why = "asked for" if limits.vision is False else "images would cost context or MTP depth (see below)"
        sentences.append(f"Text only: {why}.")
    if best.load.attention_backend:
        backend = next(one for one in space.attention_backends if one and one.name == best.load.attention_backend)
        sentences.append(f"Attention backend {backend.name}: {backend.why}.")
        faster = backend.faster_kv_cache_dtype
        if faster is not None:
            name = dtype_name(faster.value)
            sentences.append(f"With {backend.name} a KV cache in {name} is the faster one: {faster.source}.")
    if best.load.num_speculative_tokens and best.kv_cache_dtype == "fp8" and footprint.unscaled_layers:
        sentences.append("The MTP layers' KV cache uses scale 1.0: the checkpoint has no scales for them.")
    return tuple(sentences)


def neighbours(best: Candidate, candidates: list[Candidate], space: Space, judge: Judge) -> tuple[Alternative, ...]:
    """Return the candidates that differ from the chosen one in a single setting, each with what it lacks or costs."""
    found = []
    if best.context < space.wished_context:
        needed, available = best.shape.needed_bytes(space.wished_context), best.left_bytes
        reason = f"needs {format_bytes(needed)} of KV cache a rank, {format_bytes(available)} available"
        missing = needed - available
        if missing > 0:
            found.append(Alternative(f"context {space.wished_context}", reason, missing))
        else:
            limit = f"{best.load.attention_backend} is fit for {best.context} only"
            found.append(Alternative(f"context {space.wished_context}", limit))
    if best.requests < best.load.max_num_seqs:
        wish = f"KV cache for {best.load.max_num_seqs} requests of full length"
        needed = best.shape.needed_bytes(best.context, best.load.max_num_seqs)
        reason = (
            f"needs {format_bytes(needed)} a rank, {format_bytes(best.left_bytes)} available; "
            "shorter requests still run at once"
        )
        found.append(Alternative(wish, reason, needed - best.left_bytes))
    for dimension in DIMENSIONS:
        rest = best.without(dimension)
        for other in candidates:
            if other.value(dimension) != best.value(dimension) and other.without(dimension) == rest:
                found.append(Alternative(_wish(dimension, other), _verdict(best, other, judge), other.missing_bytes))
    return tuple(found)


def _context(best: Candidate, footprint: ModelFootprint, profile: Profile, limits: Limits, space: Space) -> str:
    if limits.max_model_len is not None:
        return f"Context {best.context}: asked for."
    if best.context < space.wished_context:
        return f"Context {best.context}: the longest of which one request fits into the memory left."
    if best.context == footprint.config.max_position_embeddings:
        return f"Context {best.context}: the model's own maximum, and it fits."
    if best.context == profile.max_model_len:
        return f"Context {best.context}: the maximum of profile {profile.name}, and it fits."
    return f"Context {best.context}: what the objective strives for, and it fits."


def _depth(best: Candidate, footprint: ModelFootprint, limits: Limits, judge: Judge, worthwhile: int) -> str:
    depth = best.load.num_speculative_tokens
    if limits.num_speculative_tokens is not None:
        return f"MTP depth {depth}: asked for."
    row = judge.row(best, depth, SHORT_CONTEXT_TOKENS)
    if row is not None:
        plain = judge.row(best, 0, SHORT_CONTEXT_TOKENS)
        gain = f", {row.tokens_per_second / plain.tokens_per_second:.2f} times depth 0" if plain and depth else ""
        rule = {
            "latency": "the fastest for one request",
            "throughput": "the most tokens a second with all requests running",
        }.get(limits.objective, _within(judge, best, depth))
        if limits.objective in ("balanced", "context") and depth != worthwhile:
            return (
                f"MTP depth {depth}: depth {worthwhile} is {_within(judge, best, worthwhile)} by the speed model "
                "(modelled, not measured), but its weights would shorten the context."
            )
        return f"MTP depth {depth}: {rule} by the speed model{gain} (modelled, not measured)."
    if depth:
        return f"MTP depth {depth}: the checkpoint has {footprint.mtp_layers} MTP layers."
    return "No MTP."


def _within(judge: Judge, best: Candidate, depth: int) -> str:
    """Return how `depth` compares with the fastest one at a short context."""
    rows = [judge.row(best, other, SHORT_CONTEXT_TOKENS) for other in range(judge.footprint.mtp_layers + 1)]
    fastest = max((row for row in rows if row), key=lambda row: row.tokens_per_second)
    if fastest.num_speculative_tokens == depth:
        return "the fastest"
    return f"the deepest within {TIE:.0%} of the fastest ({fastest.num_speculative_tokens})"


def dtype_name(kv_cache_dtype: str) -> str:
    """Return a KV-cache dtype as a sentence calls it."""
    return "the serving dtype" if kv_cache_dtype == "auto" else kv_cache_dtype


def _kv_dtype(best: Candidate, footprint: ModelFootprint, limits: Limits) -> str:
    name = dtype_name(best.kv_cache_dtype)
    if limits.kv_cache_dtype:
        return f"KV cache in {name}: asked for."
    if best.kv_cache_dtype == "fp8":
        if footprint.assumed:
            return (
                "KV cache in fp8: the recipe calibrates scales for every attention layer (assumed: no shard was read)."
            )
        which = "trunk layer" if footprint.unscaled_layers else "attention layer"
        return f"KV cache in fp8: the checkpoint has calibrated scales for every {which}."
    return f"KV cache in {name}."


def _ranks(best: Candidate, candidates: list[Candidate]) -> str:
    ranks = best.load.tensor_parallel_size
    fitting = sorted({one.load.tensor_parallel_size for one in candidates if one.reason is None})
    if fitting == [ranks]:
        return f"Tensor parallel {ranks}: the only number of ranks that fits."
    return f"Tensor parallel {ranks}: the best of {', '.join(map(str, fitting))} by the objective."


def _wish(dimension: str, candidate: Candidate) -> str:
    value = candidate.value(dimension)
    if dimension == "vision":
        return "images (vision tower)" if value else "text only"
    if dimension == "kv_cache_dtype" and value == "auto":
        return f"kv_cache_dtype auto ({candidate.load.dtype})"
    return f"{dimension} {value}"


def _verdict(best: Candidate, other: Candidate, judge: Judge) -> str:
    """Return why `other`, one setting away, was not chosen."""
    if other.reason is not None:
        return other.reason
    differences = []
    if other.context != best.context:
        differences.append(f"a context of {other.context} instead of {best.context}")
    if other.requests != best.requests:
        differences.append(f"{other.requests} full-length requests instead of {best.requests}")
    mine = judge.row(best, best.load.num_speculative_tokens, SHORT_CONTEXT_TOKENS)
    its = judge.row(other, other.load.num_speculative_tokens, SHORT_CONTEXT_TOKENS)
    if mine and its and round(its.tokens_per_second) != round(mine.tokens_per_second):
        differences.append(f"modelled at {its.tokens_per_second:.0f} tokens/s instead of {mine.tokens_per_second:.0f}")
    if other.left_bytes != best.left_bytes:
        change = other.left_bytes - best.left_bytes
        more = "more" if change > 0 else "less"
        differences.append(f"{format_bytes(abs(change))} {more} for the KV cache of a rank")
    return f"fits; {', '.join(differences)}" if differences else RANKS_BELOW
