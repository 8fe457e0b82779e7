"""The memory of one server, line by line: pure arithmetic from a footprint, a profile and the settings.

Every line says where its figure comes from: `computed` (from the checkpoint's own sizes), `vLLM's code` (a formula read
there and tested against it) or `assumed` (an estimate that a measurement will replace).
"""

from dataclasses import dataclass

from step128_launcher.checkpoint import Component, ModelFootprint
from step128_launcher.profiles import Profile
from step128_launcher.tensors import EH_PROJ, KV_SCALES, NORMS, ROUTER, VISION_OTHER

COMPUTED, VLLM_CODE, ASSUMED = "computed", "vLLM's code", "assumed"
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
_FLOAT32_BYTES = 4

# vLLM keeps these whole on every tensor-parallel rank; everything else is cut into equal parts.
_REPLICATED = frozenset({NORMS, ROUTER, EH_PROJ, VISION_OTHER, KV_SCALES})
# The router (GateLinear) and the KV scales are float32 in vLLM whatever the serving dtype.
_FLOAT32_COMPONENTS = frozenset({ROUTER, KV_SCALES})

# The largest image vLLM's Step-3.7 processor makes: one tile of 728 pixels and 36 crops of 504 (3024 x 3024).
_CROPS, _CROP_SIDE_PIXELS = 36, 504


@dataclass(frozen=True)
class MemoryLine:
    """One item: bytes over the whole machine (all ranks), what it is, and what its figure rests on."""

    name: str
    total_bytes: int
    evidence: str
    explanation: str


@dataclass(frozen=True)
class MemoryPlan:
    """All items against the budget; it fits if the sum is not above `budget_bytes`."""

    lines: tuple[MemoryLine, ...]
    available_bytes: int
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all items."""
        return sum(line.total_bytes for line in self.lines)

    @property
    def free_bytes(self) -> int:
        """What the plan leaves of the budget; negative if it does not fit."""
        return self.budget_bytes - self.total_bytes


@dataclass(frozen=True)
class Load:
    """The settings that memory besides the KV cache depends on."""

    dtype: str
    tensor_parallel_size: int
    num_speculative_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int


def fixed_lines(footprint: ModelFootprint, profile: Profile, load: Load) -> tuple[MemoryLine, ...]:
    """Return every item that does not depend on the context length, that is, all but the KV cache."""
    ranks = load.tensor_parallel_size
    drafting = load.num_speculative_tokens > 0
    lines = [_weights(component, load) for component in footprint.components if drafting or not component.draft]
    lines.append(_rope(footprint, load))
    lines.append(_activations(footprint, load))
    lines.append(_logits(footprint, load))
    lines.append(_dequantized(footprint, load))
    if drafting:
        embedding = footprint.config.vocab_size * footprint.config.hidden_size * DTYPE_BYTES[load.dtype]
        lines.append(
            MemoryLine("draft embedding, loading", embedding, VLLM_CODE, "the MTP draft's own copy until it shares")
        )
    lines.append(MemoryLine("API server process", profile.api_server_bytes, ASSUMED, "interpreter and libraries"))
    lines.append(MemoryLine("engine core process", profile.engine_core_bytes, ASSUMED, "interpreter and libraries"))
    workers = f"interpreter, torch and operators, {ranks} rank{'s' if ranks > 1 else ''}"
    lines.append(MemoryLine("worker processes", profile.worker_bytes * ranks, ASSUMED, workers))
    # vLLM holds image data twice: the engine core's cache of all requests' images, and the API server's for requests
    # that only render a prompt (its cache of the others keeps sizes, not images). Workers hold none.
    for process in ("API server", "engine core"):
        note = "processed images, at most (profile: mm_processor_cache)"
        lines.append(MemoryLine(f"image cache, {process}", profile.mm_processor_cache_bytes, VLLM_CODE, note))
    lines.append(MemoryLine("reserve", profile.reserve_bytes, ASSUMED, "kept free (profile)"))
    return tuple(line for line in lines if line.total_bytes)


def kv_line(kv_cache_memory_bytes: int, tensor_parallel_size: int, explanation: str) -> MemoryLine:
    """Return the KV cache's item; vLLM's setting is per rank."""
    return MemoryLine("KV cache", kv_cache_memory_bytes * tensor_parallel_size, VLLM_CODE, explanation)


def _weights(component: Component, load: Load) -> MemoryLine:
    """Return one component's weights as vLLM holds them, over all ranks."""
    name = f"{'draft' if component.draft else 'weights'}: {component.name}"
    copies = load.tensor_parallel_size if component.name in _REPLICATED else 1
    note = f", on each of {copies} ranks" if copies > 1 else ""
    if component.quantized:
        return MemoryLine(name, component.stored_bytes * copies, COMPUTED, f"stays packed{note}")
    dtype = "float32" if component.name in _FLOAT32_COMPONENTS else load.dtype
    return MemoryLine(name, component.parameters * DTYPE_BYTES[dtype] * copies, COMPUTED, f"held in {dtype}{note}")


def _rope(footprint: ModelFootprint, load: Load) -> MemoryLine:
    """Return the rotary tables: one for all full layers, one for all sliding layers, and the vision tower's."""
    config, vision = footprint.config, footprint.config.vision
    rotated = config.full_rotary_dim + config.sliding_rotary_dim
    text = config.max_position_embeddings * rotated * DTYPE_BYTES[load.dtype]
    # The tower's two-dimensional table has one float32 row a patch and is not shared between its layers.
    tower = vision.layers * vision.patches * (vision.width // vision.heads) * _FLOAT32_BYTES
    total = (text + tower) * load.tensor_parallel_size
    return MemoryLine("rope tables", total, VLLM_CODE, f"{config.max_position_embeddings} positions, on every rank")


def _activations(footprint: ModelFootprint, load: Load) -> MemoryLine:
    """Return the peak of one step: the larger of a full text batch and of the largest image.

    Text: the experts' workspaces (two, [tokens, experts a token, hidden]) and about six hidden-sized buffers. Image:
    fitted to the peak of vLLM's real tower traced on the meta device at 1, 2 and 4 ranks (error below 1 %).
    """
    config, vision, ranks = footprint.config, footprint.config.vision, load.tensor_parallel_size
    element = DTYPE_BYTES[load.dtype]
    text = load.max_num_batched_tokens * config.hidden_size * (2 * config.experts_per_token + 6) * element
    patches = vision.patches + _CROPS * (_CROP_SIDE_PIXELS // vision.patch_size) ** 2
    sharded = (2 * vision.mlp_width + 4.85 * vision.width) / ranks
    image = int(patches * (sharded + 4.15 * vision.width) * element)
    what = "largest image (3024 x 3024)" if image > text else f"{load.max_num_batched_tokens} tokens a step"
    return MemoryLine("activations", max(text, image) * ranks, ASSUMED, f"peak of {what}")


def _logits(footprint: ModelFootprint, load: Load) -> MemoryLine:
    """Return the sampler's float32 buffers: logits of each request's last and drafted tokens, and two copies."""
    rows = load.max_num_seqs * (1 + load.num_speculative_tokens)
    total = 3 * rows * footprint.config.vocab_size * _FLOAT32_BYTES * load.tensor_parallel_size
    return MemoryLine("logits", total, ASSUMED, f"{rows} rows of {footprint.config.vocab_size}, three buffers")


def _dequantized(footprint: ModelFootprint, load: Load) -> MemoryLine:
    """Return what the CPU's torch path unpacks at once: a weight (or one expert) in float32 and the serving dtype."""
    largest = 0
    for component in footprint.components:
        if component.quantized:
            experts = footprint.config.num_experts if component.name == "routed_experts" else 1
            largest = max(largest, component.largest_parameters // experts)
    total = largest * (_FLOAT32_BYTES + DTYPE_BYTES[load.dtype])
    return MemoryLine("dequantized weight", total, ASSUMED, "the torch path unpacks one weight at a time")
