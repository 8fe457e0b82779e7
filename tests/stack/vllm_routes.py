"""Every route of vLLM 0.32, decided: served (the middleware's ROUTES) or not (REFUSED), and what each key gets."""

from typing import Any

from step128_launcher.middleware.routes import ROUTES, Access

# What vLLM 0.32 mounts beside ROUTES with every option, task and its development mode on, and why it is not served.
REFUSED = {
    # Other ways to generate, past the limits here or untested with this model.
    "/invocations": "generates; vLLM asks for no key",
    "/generative_scoring": "generates; vLLM asks for no key",
    "/inference/v1/generate": "tokens in and out, for servers that share a model",
    "/v1/chat/completions/batch": "many conversations in one request",
    "/v1/messages": "Anthropic's API, with images by URL in fields of its own",
    "/v1/messages/count_tokens": "Anthropic's API",
    "/cohere/v2/chat": "Cohere's API",
    "/v1/systemone": "answers by label probabilities; not used",
    # Answers kept by the server, which keeps none.
    "/v1/responses/{response_id}": "answers kept by the server",
    "/v1/responses/{response_id}/cancel": "answers kept by the server",
    # Halves of a request, for servers that share the work.
    "/v1/chat/completions/render": "half a request",
    "/v1/completions/render": "half a request",
    "/v1/messages/render": "half a request",
    "/v1/responses/render": "half a request",
    "/cohere/v2/chat/render": "half a request",
    "/v1/chat/completions/derender": "half a request",
    "/v1/completions/derender": "half a request",
    # Ends other people's requests.
    "/inference/v1/abort_requests": "ends any request",
    "/abort_requests": "ends any request",
    # What this model does not do.
    "/v1/embeddings": "no such model",
    "/v2/embed": "no such model",
    "/pooling": "no such model",
    "/classify": "no such model",
    "/score": "no such model",
    "/v1/score": "no such model",
    "/rerank": "no such model",
    "/v1/rerank": "no such model",
    "/v2/rerank": "no such model",
    "/v1/audio/transcriptions": "no such model",
    "/v1/audio/translations": "no such model",
    "/v1/realtime": "no such model; a websocket",
    # Tells about the server what a client needs not know.
    "/load": "about the server",
    "/version": "about the server",
    "/ping": "/health under another name",
    "/tokenizer_info": "about the server",
    "/kv_event_sources": "about the server",
    "/server_info": "about the server",
    "/openapi.json": "about the server",
    "/docs": "about the server",
    "/docs/oauth2-redirect": "about the server",
    "/redoc": "about the server",
    "/static": "about the server",
    # Changes the server.
    "/scale_elastic_ep": "changes the server",
    "/is_scaling_elastic_ep": "about a change of the server",
    "/v1/load_lora_adapter": "changes the server",
    "/v1/unload_lora_adapter": "changes the server",
    "/adapters": "changes the server",
    "/adapters/{adapter_name}": "changes the server",
    "/start_profile": "changes the server",
    "/stop_profile": "changes the server",
    "/fault_tolerance/apply": "changes the server",
    "/fault_tolerance/status": "about the server",
    "/reset_prefix_cache": "changes the server",
    "/reset_mm_cache": "changes the server",
    "/reset_encoder_cache": "changes the server",
    "/collective_rpc": "runs any method",
    "/sleep": "changes the server",
    "/release_kv_cache_memory": "changes the server",
    "/wake_up": "changes the server",
    "/is_sleeping": "about the server",
    "/pause": "changes the server",
    "/resume": "changes the server",
    "/is_paused": "about the server",
    "/init_weight_transfer_engine": "changes the weights",
    "/shutdown_weight_transfer_engine": "changes the weights",
    "/start_weight_update": "changes the weights",
    "/start_draft_weight_update": "changes the weights",
    "/update_weights": "changes the weights",
    "/finish_weight_update": "changes the weights",
    "/update_weight_version": "changes the weights",
    "/weight_info": "about the server",
    "/weight_checker": "about the server",
    "/get_world_size": "about the server",
}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "Hello", "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "Hello", "max_output_tokens": 2},
    "/tokenize": {"model": "tiny", "prompt": "Hello"},
    "/detokenize": {"model": "tiny", "tokens": [1, 2]},
}
KEYS = {"no key": None, "wrong key": "wrong", "API key": "the-key", "metrics token": "the-token"}
OPENED = {Access.OPEN: set(KEYS), Access.METRICS: {"API key", "metrics token"}, Access.API: {"API key"}}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
JSON = [(b"content-type", b"application/json")]


def expected(path: str, method: str, key: str) -> int | None:
    """The status of a refusal, None where vLLM shall answer."""
    route = ROUTES.get(path)
    if route is None:
        return 404
    if key not in OPENED[route.access]:
        return 401
    return None if method == route.method else 405


def concrete(path: str) -> str:
    return path.replace("{response_id}", "resp_1").replace("{adapter_name}", "a")
