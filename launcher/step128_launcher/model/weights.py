"""The weights on one tensor-parallel rank, component by component, as vLLM 0.32 holds them.

tests/launcher/vllm_code compares them with vLLM's own model classes, built at the real size on the meta device under 1
to 16 ranks, with experts cut or shared out whole (expert parallelism: consecutive experts, the first ranks one more):
equal to the byte. So are checkpoints in compressed-tensors' FP8; vLLM cannot build the other foreign formats on a CPU,
so theirs are computed: as stored, cut like the weights, the scales of 8-bit values in float32. Not counted: on
ROCm vLLM adds 256 bytes to each row of FP8 linears (not experts) whose row is a multiple of 512 bytes
(fp8_utils._maybe_pad_fp8_weight, VLLM_ROCM_FP8_PADDING=0 turns it off), 6 % of them at 4,096 columns.
"""

from dataclasses import dataclass

from step128_launcher.model.footprint import Component, ModelFootprint, Part
from step128_launcher.model.model_config import ModelConfig
from step128_launcher.model.model_weights import KV_SCALES, ROUTED_EXPERTS, ROUTER, VISION_LINEARS, VISION_OTHER, Cut

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# GateLinear's params_dtype (need_fp32_gate) and the attention layers' scales, whatever the serving dtype.
_FLOAT32_COMPONENTS = frozenset({ROUTER, KV_SCALES})
_VISION_COMPONENTS = frozenset({VISION_LINEARS, VISION_OTHER})
_VOCABULARY_PADDING = 64  # vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True)
class RankWeights:
    """One component on the fullest rank; `draft` of the MTP layers, `vision` of the tower and its projector."""

    component: str
    draft: bool
    vision: bool
    rank_bytes: int
    explanation: str


def rank_weights(
    footprint: ModelFootprint,
    *,
    dtype: str,
    tensor_parallel_size: int,
    expert_parallel: bool = False,
    drafting: bool,
    vision: bool,
) -> tuple[RankWeights, ...]:
    """Return every component that one rank holds after loading, in the footprint's order.

    `dtype` is the serving dtype of unquantized weights. Without `drafting` vLLM loads no MTP layer, without `vision`
    (no image may be in a prompt) neither tower nor projector. The draft has no embedding of its own once it is loaded:
    it shares the trunk's. `tensor_parallel_size` must be one that `indivisible` does not complain about.
    """
    found = []
    for component in footprint.components:
        seen = component.name in _VISION_COMPONENTS
        if (component.draft and not drafting) or (seen and not vision):
            continue
        held = "float32" if component.name in _FLOAT32_COMPONENTS else dtype
        experts = expert_parallel and component.name == ROUTED_EXPERTS
        rank_bytes = sum(
            _part_bytes(part, footprint.config, _DTYPE_BYTES[held], tensor_parallel_size, experts)
            for part in component.parts
        )
        explanation = _explain(component, held, tensor_parallel_size, experts)
        found.append(RankWeights(component.name, component.draft, seen, rank_bytes, explanation))
    return tuple(found)


def _part_bytes(part: Part, config: ModelConfig, element_bytes: int, ranks: int, expert_parallel: bool) -> int:
    """Return one part's bytes on the fullest rank."""
    total = part.packed_bytes if part.quantized else part.parameters * element_bytes
    if expert_parallel:
        return total * -(-config.num_experts // ranks) // config.num_experts
    match part.cut:
        case Cut.WHOLE:
            return total
        case Cut.ROWS | Cut.COLUMNS:
            return total // ranks
        case Cut.KV_ROWS:
            return total * max(1, config.num_kv_heads // ranks) // config.num_kv_heads
        case Cut.VOCABULARY:
            return total * (_padded(config.vocab_size) // ranks) // config.vocab_size


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def _explain(component: Component, held: str, ranks: int, expert_parallel: bool) -> str:
    kinds = {part.quantized for part in component.parts}
    text = {frozenset({True}): "stays packed", frozenset({False}): f"held in {held}"}.get(
        frozenset(kinds), f"packed, and what is not in {held}"
    )
    if ranks == 1:
        return text
    if expert_parallel:
        return f"{text}, experts shared out to {ranks} ranks whole (expert parallel)"
    whole = {part.cut is Cut.WHOLE for part in component.parts}
    if whole == {True}:
        return f"{text}, whole on each of {ranks} ranks"
    return f"{text}, cut for {ranks} ranks" + (" but for what each needs whole" if True in whole else "")


def indivisible(footprint: ModelFootprint, tensor_parallel_size: int, *, expert_parallel: bool = False) -> str | None:
    """Return a sentence saying what `tensor_parallel_size` does not divide, or None if vLLM can cut the model so."""
    ranks, config = tensor_parallel_size, footprint.config
    counts = {
        "attention heads": config.num_attention_heads,
        "sliding-attention heads": config.num_sliding_attention_heads,
        "rows of the (padded) vocabulary": _padded(config.vocab_size),
        "channels of the dense MLP": config.intermediate_size,
        "channels of the shared expert": config.shared_expert_size,
    }
    if not expert_parallel:
        counts["channels of an expert"] = config.moe_intermediate_size
    # Of the tower too when it is not used: vLLM builds it all the same, and drops it then.
    counts["vision heads"] = config.vision.heads
    counts["channels of the vision tower's MLP"] = config.vision.mlp_width
    counts["channels of the vision projector"] = config.hidden_size
    for what, count in counts.items():
        if count % ranks:
            return f"{ranks} ranks do not divide the model's {count} {what}."
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        return f"{ranks} ranks neither divide the model's {config.num_kv_heads} KV heads nor are a multiple of them."
    return _uneven_groups(footprint, ranks, expert_parallel)


def _uneven_groups(footprint: ModelFootprint, ranks: int, expert_parallel: bool) -> str | None:
    """Return which quantized weight, cut by columns, a rank would get a broken group of, and so no scale for it."""
    config, quantization = footprint.config, footprint.quantization
    if quantization is None or quantization.group_size is None:
        return None
    heads = sorted({config.attention_heads(layer) for layer in config.main_layers})
    mtp_heads = sorted({config.attention_heads(layer) for layer in config.mtp_layer_indices})
    columns = {
        "attention": [count * config.head_dim for count in heads],
        "dense_mlp": [config.intermediate_size],
        "shared_experts": [config.shared_expert_size],
        "routed_experts": [] if expert_parallel else [config.moe_intermediate_size],
        "mtp_linears": [*(count * config.head_dim for count in mtp_heads), config.intermediate_size],
        "vision_linears": [config.vision.width, config.vision.mlp_width],
    }
    for component in sorted(quantization.components & columns.keys()):
        for count in columns[component]:
            if count // ranks % quantization.group_size:
                return (
                    f"{ranks} ranks leave each {count // ranks} of the {count} input channels of {component}, "
                    f"which is no multiple of {quantization.method}'s group of {quantization.group_size}."
                )
    return None
