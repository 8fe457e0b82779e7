"""The memory of one server, item by item: pure arithmetic from a footprint, a profile and the settings."""

from collections.abc import Callable
from dataclasses import replace

from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.weights import RankWeights, rank_weights
from step128_launcher.planning.calibration import Measurement
from step128_launcher.planning.items import (
    ASSUMED,
    COLLECTIVES,
    COMPUTED,
    DTYPE_BYTES,
    FLOAT32_BYTES,
    RUNTIME,
    RUNTIME_MEASURED,
    VLLM_CODE,
    Load,
    MemoryLine,
    assumed,
    measured_line,
    process,
    weights_line,
)
from step128_launcher.planning.kv_cache import group_counts
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.reserved import OUR_ATTENTION_BACKEND

# The largest image vLLM's Step-3.7 processor makes: one tile of 728 pixels and 36 crops of 504 (3024 x 3024).
_CROPS, _CROP_SIDE_PIXELS, _IMAGE_TOKENS = 36, 504, 3164

# vLLM's Triton attention: segments of a split, and the grid below which it splits (triton_attn.py of vLLM 0.32).
_SEGMENTS, _LAUNCH_GRID = 16, 128
# MOST_SPLIT_ROWS of our kernels (attention/limits.py); a test compares.
_SPLIT_ROWS = 1024
_SCRATCH = "attention scratch"


class Ledger:
    """All memory items of one model on one kind of machine; items are kept, because a search asks for them often."""

    def __init__(
        self,
        footprint: ModelFootprint,
        profile: Profile,
        find_measurement: Callable[[Load], Measurement | None] = lambda load: None,
    ) -> None:
        self.footprint, self.profile = footprint, profile
        self._find = find_measurement
        self._on_gpu = profile.device != "cpu"
        self._kept: dict[tuple[object, ...], tuple[tuple[MemoryLine, ...], int]] = {}

    def lines(self, load: Load) -> tuple[MemoryLine, ...]:
        """Return every item of the pool that holds the model, but the KV cache: of one GPU, or of the host on a CPU."""
        return tuple(line for group in self._groups(load) for line in group[0] if line.total_bytes)

    def total_bytes(self, load: Load) -> int:
        """Return the sum of `lines(load)`."""
        return sum(group[1] for group in self._groups(load))

    def is_measured(self, load: Load) -> bool:
        """Return whether an earlier start measured these very settings."""
        return self._find(load) is not None

    def bytes_per_sequence(self, load: Load) -> int:
        """Return what one more of max_num_seqs costs: its logits. Nothing else grows by it, unless it was measured."""
        one = replace(load, max_num_seqs=1)
        return self._logits(one).total_bytes

    def host_lines(self, load: Load) -> tuple[MemoryLine, ...]:
        """Return the items of the host's memory besides what the model takes of it."""
        return self._keep(("host", load.tensor_parallel_size, load.vision), lambda: self._processes(load))[0]

    def host_bytes(self, load: Load) -> int:
        """Return the sum of `host_lines(load)`."""
        return self._keep(("host", load.tensor_parallel_size, load.vision), lambda: self._processes(load))[1]

    def weights_bytes(self, load: Load) -> int:
        """Return the weights of one rank."""
        return self._keep(self._weights_key(load), lambda: self._weights(load))[1] // self.ranks_in_pool(load)

    def weights_of(self, load: Load) -> tuple[RankWeights, ...]:
        """Return the weights of one rank, by component."""
        return rank_weights(
            self.footprint,
            dtype=load.dtype,
            tensor_parallel_size=load.tensor_parallel_size,
            expert_parallel=load.enable_expert_parallel,
            drafting=load.num_speculative_tokens > 0,
            vision=load.vision,
        )

    def runtime_bytes(self, load: Load) -> int:
        """Return what the driver's context and collectives take of a GPU, assumed or measured."""
        names = (RUNTIME, COLLECTIVES, RUNTIME_MEASURED)
        return sum(line.total_bytes for line in self.lines(load) if line.name in names)

    def ranks_in_pool(self, load: Load) -> int:
        """Return how many ranks share the pool: all of them on a CPU, one a GPU."""
        return 1 if self._on_gpu else load.tensor_parallel_size

    def _groups(self, load: Load) -> list[tuple[tuple[MemoryLine, ...], int]]:
        ranks, depth = load.tensor_parallel_size, load.num_speculative_tokens
        measured = self._find(load)
        groups = [
            self._keep(self._weights_key(load), lambda: self._weights(load)),
            self._keep(("tables", ranks, load.vision, load.dtype), lambda: (self._rope(load),)),
            self._keep(
                ("activations", ranks, load.max_num_batched_tokens, load.vision, load.dtype, measured),
                lambda: (self._activations(load, measured),),
            ),
        ]
        if measured is None or measured.activation_bytes is None:  # what is measured holds the logits too
            groups.append(self._keep(("logits", ranks, load.max_num_seqs, depth), lambda: (self._logits(load),)))
        if self._on_gpu:
            key = ("gpu", ranks, depth > 0, load.attention_backend, load.enforce_eager, measured)
            groups.append(self._keep(key, lambda: self._gpu(load, measured)))
        else:
            groups.append(self._keep(("cpu", ranks, depth > 0, load.dtype), lambda: self._cpu(load)))
            groups.append((self.host_lines(load), self.host_bytes(load)))
        groups.append(self._keep(("reserve",), lambda: (self._reserve(),)))
        return groups

    def _keep(
        self, key: tuple[object, ...], make: Callable[[], tuple[MemoryLine, ...]]
    ) -> tuple[tuple[MemoryLine, ...], int]:
        if key not in self._kept:
            lines = make()
            self._kept[key] = lines, sum(line.total_bytes for line in lines)
        return self._kept[key]

    @staticmethod
    def _weights_key(load: Load) -> tuple[object, ...]:
        drafting = load.num_speculative_tokens > 0
        return (
            *("weights", load.tensor_parallel_size, drafting, load.vision),
            *(load.dtype, load.enable_expert_parallel),
        )

    def _weights(self, load: Load) -> tuple[MemoryLine, ...]:
        ranks = self.ranks_in_pool(load)
        source = "config.json and the policy" if self.footprint.assumed else "headers of the shards, config.json"
        return tuple(weights_line(part, ranks, source) for part in self.weights_of(load))

    def _rope(self, load: Load) -> MemoryLine:
        """Return the rotary tables: one for all full layers, one for all sliding layers, and the vision tower's."""
        config, vision = self.footprint.config, self.footprint.config.vision
        rotated = config.full_rotary_dim + config.sliding_rotary_dim
        total = config.max_position_embeddings * rotated * DTYPE_BYTES[load.dtype]
        if load.vision:
            # The tower's two-dimensional table has one float32 row a patch and is not shared between its layers.
            total += vision.layers * vision.patches * (vision.width // vision.heads) * FLOAT32_BYTES
        what = f"{config.max_position_embeddings} positions, whole on every rank"
        return MemoryLine("rope tables", total * self.ranks_in_pool(load), VLLM_CODE, what, "rotary_embedding.py")

    def _activations(self, load: Load, measured: Measurement | None) -> MemoryLine:
        """Return the peak of one step: the larger of a full text batch and of the largest image.

        Text: the experts' workspaces (two, [tokens, experts a token, hidden]) and about six hidden-sized buffers. For
        NL4 on a GPU that is an upper bound: the workspaces are [tokens, experts a token, hidden + intermediate of the
        rank] there (nl4_moe/triton_moe.py; a few tokens take float32, which is far less than a full batch).
        Images: as many of the largest as max_num_batched_tokens holds go through the tower at once (vLLM's encoder
        budget, v1/core/encoder_cache_manager.py). One was fitted to the peak of vLLM's real tower, traced on the meta
        device at 1, 2 and 4 ranks (error below 1 %).
        """
        if measured is not None and measured.activation_bytes is not None:
            return measured_line("activations", measured.activation_bytes * self.ranks_in_pool(load), measured)
        config, vision, ranks = self.footprint.config, self.footprint.config.vision, load.tensor_parallel_size
        element = DTYPE_BYTES[load.dtype]
        text = load.max_num_batched_tokens * config.hidden_size * (2 * config.experts_per_token + 6) * element
        image = images = 0
        if load.vision:
            images = max(1, load.max_num_batched_tokens // _IMAGE_TOKENS)
            patches = images * (vision.patches + _CROPS * (_CROP_SIDE_PIXELS // vision.patch_size) ** 2)
            sharded = (2 * vision.mlp_width + 4.85 * vision.width) / ranks
            image = int(patches * (sharded + 4.15 * vision.width) * element)
        what = f"{load.max_num_batched_tokens} tokens a step"
        if image > text:
            what = f"{images} of the largest images (3024 x 3024)" if images > 1 else "largest image (3024 x 3024)"
        source = "text: vLLM's MoE workspaces; image: vLLM's tower traced without data, 1 to 4 ranks"
        total = max(text, image) * self.ranks_in_pool(load)
        return MemoryLine("activations", total, ASSUMED, f"peak of {what}", source)

    def _logits(self, load: Load) -> MemoryLine:
        """Return the sampler's float32 buffers: logits of each request's last and drafted tokens, and two copies."""
        rows = load.max_num_seqs * (1 + load.num_speculative_tokens)
        total = 3 * rows * self.footprint.config.vocab_size * FLOAT32_BYTES * self.ranks_in_pool(load)
        what = f"{rows} rows of {self.footprint.config.vocab_size} to verify, three buffers"
        return MemoryLine("logits", total, ASSUMED, what, "vLLM's sampler and rejection sampler")

    def _gpu(self, load: Load, measured: Measurement | None) -> tuple[MemoryLine, ...]:
        """Return what a GPU holds besides tensors of the model: split attention, graphs, runtime, collectives."""
        profile, several = self.profile, load.tensor_parallel_size > 1
        scratch = {"TRITON_ATTN": self._segments, OUR_ATTENTION_BACKEND: self._partial_results}.get(
            load.attention_backend or ""
        )
        lines = [] if scratch is None else [scratch(load)]
        if measured is not None and measured.non_torch_bytes is not None:
            lines.append(measured_line(RUNTIME_MEASURED, measured.non_torch_bytes, measured))
        else:
            lines.append(assumed(RUNTIME, profile.runtime_context, "driver context and code objects"))
            if several:
                ranks = f"buffers of {load.tensor_parallel_size} ranks"
                lines.append(assumed(COLLECTIVES, profile.collectives, ranks))
        if not load.enforce_eager:
            if measured is not None and measured.graph_bytes is not None:
                lines.append(measured_line("graphs", measured.graph_bytes, measured))
            else:
                lines.append(assumed("graphs", profile.graphs, "captured decode and verification steps"))
        return tuple(lines)

    def _partial_results(self, load: Load) -> MemoryLine:
        """Return what our attention's splits leave for their sum: float32 [rows, query heads, head_dim + 1], once.

        Rows are sequences x query tokens x splits of a launch, which the kernels keep below a bound; vLLM's workspace
        holds the buffer for all layers of a worker, one after the other.
        """
        config = self.footprint.config
        heads = max(config.num_attention_heads, config.num_sliding_attention_heads) // load.tensor_parallel_size
        total = _SPLIT_ROWS * heads * (config.head_dim + 1) * FLOAT32_BYTES
        what = f"{_SPLIT_ROWS} rows of {heads} heads, shared by all layers"
        return MemoryLine(_SCRATCH, total, COMPUTED, what, "attention/limits.py of our kernels")

    def _segments(self, load: Load) -> MemoryLine:
        """Return the partial results of vLLM's split attention: one float32 buffer for each group of the KV cache.

        A buffer is [rows, query heads, segments, head_dim + 2]. A group holds layers of one kind (see kv_cache.py).
        """
        config, ranks = self.footprint.config, load.tensor_parallel_size
        rows = _LAUNCH_GRID // max(1, config.num_kv_heads // ranks)
        full, sliding = group_counts(config, self.footprint.mtp_layers if load.num_speculative_tokens else 0)
        heads = full * config.num_attention_heads + sliding * config.num_sliding_attention_heads
        total = rows * (heads // ranks) * _SEGMENTS * (config.head_dim + 2) * FLOAT32_BYTES
        what = f"{_SEGMENTS} segments, {full + sliding} groups of layers"
        return MemoryLine(_SCRATCH, total, VLLM_CODE, what, "v1/attention/backends/triton_attn.py")

    def _reserve(self) -> MemoryLine:
        source = self.profile.source("reserve_bytes")
        return MemoryLine("reserve", self.profile.reserve_bytes, ASSUMED, "kept free (profile)", source)

    def _cpu(self, load: Load) -> tuple[MemoryLine, ...]:
        """Return what the CPU's torch path unpacks at once, and the draft's own embedding until it shares."""
        largest = 0
        for component in self.footprint.components:
            if component.quantized:
                experts = self.footprint.config.num_experts if component.name == "routed_experts" else 1
                largest = max(largest, component.largest_parameters // experts)
        unpacked = largest * (FLOAT32_BYTES + DTYPE_BYTES[load.dtype])
        what = "the torch path unpacks one weight at a time"
        lines = [
            MemoryLine("dequantized weight", unpacked, ASSUMED, what, "nl4_gemm/reference.py: float32, then the dtype")
        ]
        if load.num_speculative_tokens:
            embedding = self.footprint.config.vocab_size * self.footprint.config.hidden_size * DTYPE_BYTES[load.dtype]
            what = "the MTP draft's own copy until it shares"
            source = "models/step3p5_mtp.py, v1/spec_decode"
            lines.append(MemoryLine("draft embedding, loading", embedding, VLLM_CODE, what, source))
        return tuple(lines)

    def _processes(self, load: Load) -> tuple[MemoryLine, ...]:
        """Return vLLM's processes, and their caches of processed images.

        vLLM holds image data twice: the engine core's cache of all requests' images, and the API server's for requests
        that only render a prompt (its cache of the others keeps sizes, not images). Workers hold none.
        """
        profile, ranks = self.profile, load.tensor_parallel_size
        workers = f"interpreter, torch and operators, {ranks} rank{'s' if ranks > 1 else ''}"
        lines = [
            process("API server process", "api_server_bytes", profile, 1, "interpreter and libraries"),
            process("engine core process", "engine_core_bytes", profile, 1, "interpreter and libraries"),
            process("worker processes", "worker_bytes", profile, ranks, workers),
        ]
        note = "processed images, at most (profile: mm_processor_cache)"
        for name in ("API server", "engine core") if load.vision else ():
            source = "multimodal/cache.py; the limit is the profile's"
            lines.append(MemoryLine(f"image cache, {name}", profile.mm_processor_cache_bytes, VLLM_CODE, note, source))
        return tuple(line for line in lines if line.total_bytes)
