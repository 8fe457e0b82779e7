"""Each route of vLLM, each key, against vLLM's real application without an engine (test_access_served.py: with one).

The routes are those that vLLM itself mounts. A route of a later release that is in neither list fails here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from asgi_requests import ask, bearer
from vllm_routes import BODIES, CHAT, JSON, KEYS, METHODS, REFUSED, concrete, expected

from step128_launcher.access import ACCESS_VARIABLE, METRICS_TOKEN_VARIABLE, AccessLimits
from step128_launcher.middleware.media import IMAGE_TYPES, REFUSED_TYPES
from step128_launcher.middleware.routes import ROUTES


@dataclass
class Mounted:
    path: str
    methods: frozenset[str]


def routes_of(app: Any) -> list[Mounted]:
    found = []
    for route in app.routes:
        assert route.path, f"a route without a path: {route}"
        found.append(Mounted(route.path, frozenset(getattr(route, "methods", None) or ())))
    return found


class Reached:
    """Stands in for each part of vLLM behind its routes."""

    def __getattr__(self, name: str) -> Any:
        async def reached(*_: Any, **__: Any) -> None:
            raise NotImplementedError("vLLM was reached")

        return reached


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Build vLLM's application as its server does, with the middleware loaded by name."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from step128_launcher.command import MIDDLEWARE

    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    monkeypatch.setenv(METRICS_TOKEN_VARIABLE, "the-token")
    monkeypatch.setenv(ACCESS_VARIABLE, AccessLimits().to_json())

    def do(*options: str, tasks: tuple[str, ...] = ("generate",)) -> Any:
        arguments = ["--model", "m", "--middleware", MIDDLEWARE, *options]
        app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(arguments), tasks, None)
        app.state.log_stats = app.state.enable_server_load_tracking = False
        for name in ("chat", "completion", "responses", "models", "chat_batch"):
            setattr(app.state, f"openai_serving_{name}", Reached())
        app.state.serving_tokenization = app.state.anthropic_serving_messages = Reached()
        app.state.engine_client = SimpleNamespace(check_health=_healthy, errored=False, is_running=True)
        return app

    return do


async def _healthy() -> None:
    pass


def test_every_route_of_vllm_is_decided(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from typing import get_args

    from vllm import tasks

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    every = tuple({*get_args(tasks.GenerationTask), *get_args(tasks.PoolingTask), *get_args(tasks.FrontendTask)})
    options = ("--enable-offline-docs", "--enable-scale-out", "--enable-tokenizer-info-endpoint")
    options += ("--enable-fault-tolerance", "--profiler-config", '{"profiler": "torch", "torch_profiler_dir": "/tmp"}')
    apps = [build(*options, tasks=every), build(tasks=every), build("--tokens-only")]
    mounted = {route.path for app in apps for route in routes_of(app)}
    assert mounted - ROUTES.keys() - REFUSED.keys() == set(), "decide whether these shall be served"
    assert ROUTES.keys() <= mounted, "these are gone from vLLM"
    assert not ROUTES.keys() & REFUSED.keys()
    print(f"\n{len(mounted)} routes of vLLM, {len(ROUTES)} served; not mounted: {sorted(REFUSED.keys() - mounted)}")


@pytest.mark.parametrize("docs", ["--disable-fastapi-docs", "--enable-offline-docs"])
def test_matrix_against_vllm_s_application(docs: str, build: Callable[..., Any]) -> None:
    app = build(docs)
    assert app.user_middleware[0].cls.__name__ == "Guard", "something of vLLM's stands before the middleware"
    seen = 0
    for path in {*ROUTES, *REFUSED, *(route.path for route in routes_of(app))}:
        for method in METHODS:
            for name, key in KEYS.items():
                body = json.dumps(BODIES.get(path, CHAT)).encode() if method not in ("GET", "HEAD") else b""
                answer = ask(app, method, concrete(path), [*JSON, *(bearer(key) if key else [])], body)
                wanted = expected(path, method, name)
                if wanted is None:
                    assert answer.status in (200, 501), (path, method, name, answer)
                    assert answer.status == 200 or b"vLLM was reached" in answer.body, (path, answer)
                else:
                    assert answer.status == wanted, (path, method, name, answer)
                seen += 1
    assert seen >= len(METHODS) * len(KEYS) * (len(ROUTES) + len(REFUSED))


def test_every_kind_of_content_part_is_decided() -> None:
    from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES

    undecided = MM_PARSER_MAP.keys() - TEXT_PART_TYPES - REFUSED_TYPES - IMAGE_TYPES
    assert undecided == {"tool_reference"}, "text; else decide whether these may carry media"


def test_every_field_that_may_name_media_is_decided() -> None:
    """Fields of the requests whose names speak of media, transfers or templates; a new one is to be looked at."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

    from step128_launcher.middleware.amounts import REFUSED_FIELDS, TOKEN_FIELDS

    models = (ChatCompletionRequest, CompletionRequest, ResponsesRequest, TokenizeChatRequest)
    fields = {name for model in models for name in model.model_fields}
    words = ("url", "media", "mm_", "image", "audio", "video", "embed", "file", "transfer", "template", "args", "path")
    told = {name for name in fields if any(word in name for word in words)}
    harmless = {"chat_template_kwargs", "mm_payload", "return_mm_kwargs"}  # the last two: for routes not served
    assert told <= {*REFUSED_FIELDS, *harmless} and {*REFUSED_FIELDS} <= told | {"prompt_embeds"}
    numbers = {name for name in fields if name.startswith("max_")}
    assert numbers == {*TOKEN_FIELDS, "max_tool_calls"}
