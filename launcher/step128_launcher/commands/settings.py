"""The settings of a plan: vLLM's name of each, and why it is set at all."""

SETTINGS = {
    "max_model_len": (
        "The longest request, prompt and answer together. The KV cache must hold one of this length, or vLLM refuses "
        "to start."
    ),
    "num_speculative_tokens": (
        "Tokens that the MTP layers draft for each step. Deeper drafts yield more tokens a step, and cost weights, KV "
        "cache and verification."
    ),
    "kv_cache_dtype": (
        "fp8 halves the KV cache and is chosen only where the checkpoint has calibrated scales for it; auto is the "
        "dtype of the activations."
    ),
    "max_num_seqs": (
        "Requests decoded at once, at most. vLLM sizes graphs and the logits of verification by it; the rest queue."
    ),
    "max_num_batched_tokens": (
        "Tokens of one scheduler step, which decide the peak of the activations and how fast a long prompt is read."
    ),
    "tensor_parallel_size": "Ranks that each layer is cut into, one a GPU (on a CPU: one for each group of cores).",
    "enable_expert_parallel": "Whole experts on each rank instead of a slice of every one; only if asked for.",
    "dtype": "Of the activations and the unquantized weights. bfloat16 is what the model was trained in.",
    "block_size": "Tokens of a block of KV cache, the unit in which vLLM deals it out; a request wastes half of one.",
    "enforce_eager": "Whether vLLM runs without torch.compile and captured graphs: a shorter start, slower decoding.",
    "vision": "Whether images are served. Without, vLLM loads no vision tower and its memory goes to the KV cache.",
    "attention_backend": (
        "vLLM's attention kernels. Always named on a GPU, because vLLM's own choice differs by device and version."
    ),
    "gpu_memory_utilization": (
        "vLLM refuses to start if less than this share of the GPU's memory is free; with --kv-cache-memory-bytes it "
        "decides nothing else."
    ),
    "kv_cache_memory_bytes": (
        "The KV cache of a rank, given in bytes so that vLLM does not size it by its own measurement; what the plan "
        "says is what is allocated."
    ),
    "mm_processor_cache_bytes": (
        "vLLM's cache of processed images in host memory, so that an image sent again is not processed again; two "
        "processes may fill one each."
    ),
}
