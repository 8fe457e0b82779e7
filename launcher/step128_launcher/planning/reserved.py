"""What a profile may not set, because the launcher does, and the attention backends it may name."""

# Each flag that the launcher gives vLLM itself (command.server_argv), and those that would undo what it plans: a second
# value would silently win, so that another server than the planned one runs.
RESERVED_FLAGS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--load-format",
    "--dtype",
    "--max-model-len",
    "--block-size",
    "--kv-cache-dtype",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--tensor-parallel-size",
    "--reasoning-parser",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "--shutdown-timeout",
    "--mm-processor-cache-gb",
    "--disable-uvicorn-access-log",
    "--disable-fastapi-docs",
    "--middleware",
    "--speculative-config",
    "--enforce-eager",
    "--attention-backend",
    "--enable-expert-parallel",
    "--limit-mm-per-prompt",
    "--chat-template",
    "--api-key",
    "--config",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    # Who may ask for what, and what is kept of it (the middleware, README "Access").
    "--allow-credentials",
    "--allowed-headers",
    "--allowed-local-media-path",
    "--allowed-media-domains",
    "--allowed-methods",
    "--allowed-origins",
    "--enable-log-outputs",
    "--enable-log-requests",
    "--no-enable-log-requests",
    "--enable-mm-embeds",
    "--enable-offline-docs",
    "--enable-prompt-embeds",
    "--max-log-len",
    "--media-io-kwargs",
    "--override-generation-config",
    "--root-path",
    "--tool-server",
    "--trust-remote-code",
    "--trust-request-chat-template",
    "--trust-request-mm-kwargs",
    "--uds",
)
# vLLM 0.32, engine/arg_utils.py: the short names of some of them.
_SHORT_FLAGS = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-sc": "--speculative-config",
}
# Set by the launcher, or what would keep its plugin and its plan from taking effect (command.py).
_RESERVED_VARIABLES = (
    "VLLM_API_KEY",
    "VLLM_PLUGINS",
    "VLLM_CPU_KVCACHE_SPACE",
    "PYTHONSAFEPATH",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_ENABLE_RESPONSES_API_STORE",
    "VLLM_MAX_IMAGE_PIXELS",
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB",
    "VLLM_MEDIA_CACHE",
    "VLLM_MEDIA_CONNECTOR",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS",
    "VLLM_SERVER_DEV_MODE",
)
_RESERVED_PREFIX = "STEP128_"

# vLLM 0.32, v1/attention/backends/registry.py, AttentionBackendEnum: those for plain attention on ROCm and CUDA. Our
# plugin's is vLLM's member CUSTOM.
OUR_ATTENTION_BACKEND = "CUSTOM"
ATTENTION_BACKENDS = (
    OUR_ATTENTION_BACKEND,
    "FLASH_ATTN",
    "TRITON_ATTN",
    "ROCM_ATTN",
    "ROCM_AITER_FA",
    "ROCM_AITER_UNIFIED_ATTN",
    "FLASHINFER",
    "FLEX_ATTENTION",
)


def reserved_flag(argument: str) -> str | None:
    """Return the launcher's flag that an argument of vLLM gives, or None.

    As vLLM's parser reads it: `_` for `-`, `--flag=value`, `--flag.key value`, `--no-flag`, and a shortened name.
    """
    name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
    if name in _SHORT_FLAGS:
        return _SHORT_FLAGS[name]
    if len(name) <= len("--") or not name.startswith("--"):
        return None
    name = name.replace("--no-", "--", 1) if name.startswith("--no-") else name
    return next((flag for flag in RESERVED_FLAGS if flag == name), None) or next(
        (flag for flag in RESERVED_FLAGS if flag.startswith(name)), None
    )


def is_reserved_variable(name: str) -> bool:
    """Whether the launcher decides this environment variable."""
    return name in _RESERVED_VARIABLES or name.startswith(_RESERVED_PREFIX)
