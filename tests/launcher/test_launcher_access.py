"""What the options about access become: flags and environment of vLLM, and the metrics token."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from step128_launcher import cli
from step128_launcher.access import AccessLimits
from step128_launcher.api_key import ApiKey, find_metrics_token
from step128_launcher.command import UNSET_VARIABLES, Server, environment_changes, server_argv, server_environment
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.plan import Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.reserved import RESERVED_FLAGS, is_reserved_variable, reserved_flag

SERVER = Server(Path("/models/m"), "m", "127.0.0.1", 8000, Path("/state/load-reports"), 20)
MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"
MACHINE = Path(__file__).parents[1] / "machines" / "quad-r9700"


@pytest.fixture
def plan(footprint: ModelFootprint, cpu_profile: Profile, make_machine: Callable[..., Hardware]) -> Plan:
    return make_plan(make_machine(cpus=2), footprint, cpu_profile, Limits())


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[str], dict[str, str]]:
    """argv and environment of `step128 plan` with these options."""
    arguments = ["plan", str(MODEL), "--machine", str(MACHINE), "--policy", "all-linears", "--json", *options]
    assert cli.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    return document["argv"], document["environment"]


def test_options_reach_vllm_and_the_middleware(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-body-size", "1MiB", "--max-tokens-per-request", "500", "--max-images", "3"]
    options += ["--max-image-size", "1500KiB", "--max-image-pixels", "1000000"]
    options += ["--allow-media-domains", "a.example, CDN.b.example"]
    argv, environment = planned(capsys, *options)
    wanted = AccessLimits(1 << 20, 500, 3, 1500 << 10, 1_000_000, ("a.example", "cdn.b.example"))
    assert AccessLimits.from_json(environment["STEP128_ACCESS"]) == wanted
    assert environment["VLLM_MAX_IMAGE_PIXELS"] == "1000000"
    assert environment["VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"] == "2"
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert argv[argv.index("--limit-mm-per-prompt") + 1] == '{"image": 3}'
    assert argv[argv.index("--override-generation-config") + 1] == '{"max_new_tokens": 500}'
    start = argv.index("--allowed-media-domains")
    assert argv[start + 1 : start + 4] == ["a.example", "cdn.b.example", "--disable-cascade-attn"]


def test_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    argv, environment = planned(capsys, "--no-vision")
    limits = AccessLimits.from_json(environment["STEP128_ACCESS"])
    assert limits == replace(AccessLimits(), max_tokens=204800, max_images=0)
    forbidden = "--allowed-media-domains --override-generation-config --trust-remote-code --allowed-origins --api-key"
    assert not set(forbidden.split()) & set(argv)
    assert {"--disable-fastapi-docs", "--disable-uvicorn-access-log", "--no-enable-log-requests"} <= set(argv)


NO_DOMAINS = [
    *("", ",", "127.0.0.1", "a", "localhost", "a.example:80", "http://a.example", "*.example", "a..example", "[::1]"),
    *("-a.example", "a.example.", "a.1", "a.example,", "a b.example", "a.example,10.0.0.1", "x" * 64 + ".example"),
]


@pytest.mark.parametrize("value", NO_DOMAINS)
def test_names_that_are_no_domains(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(MODEL), f"--allow-media-domains={value}"])
    assert caught.value.code == ExitCode.USAGE and "images.example.org" in capsys.readouterr().err


def test_what_the_user_s_shell_says_does_not_open_the_server(plan: Plan) -> None:
    opened = dict.fromkeys((*UNSET_VARIABLES, "VLLM_MEDIA_URL_ALLOW_REDIRECTS", "VLLM_MAX_IMAGE_PIXELS"), "1")
    environment = server_environment(opened, plan, SERVER, "k")
    assert not set(UNSET_VARIABLES) & environment.keys()
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0" and environment["VLLM_MAX_IMAGE_PIXELS"] == "50000000"
    assert server_environment(opened, plan, SERVER, "k", "t")["STEP128_METRICS_TOKEN"] == "t"
    assert not {"k", "t"} & {*environment_changes(plan, SERVER, {}).values(), *server_argv(plan, SERVER)}


def test_vllm_knows_these_variables(plan: Plan) -> None:
    """One that a later vLLM renames would silently stop to be unset, or to take effect."""
    from vllm import envs

    given = {*UNSET_VARIABLES, *environment_changes(plan, SERVER, {})}
    assert {name for name in given if name.startswith("VLLM_")} <= {*envs.environment_variables}


def test_a_profile_cannot_open_the_server() -> None:
    for flag in ("--trust-remote-code", "--allowed-origins", "--enable-log-requests", "--allowed-local-media-path=/"):
        assert reserved_flag(flag) in RESERVED_FLAGS
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_MEDIA_URL_ALLOW_REDIRECTS", "STEP128_ACCESS", "STEP128_METRICS_TOKEN"):
        assert is_reserved_variable(name)


def test_where_the_metrics_token_comes_from(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from file\n")
    environment = {"STEP128_METRICS_TOKEN": "from shell"}
    given, said = find_metrics_token(tmp_path / "token", environment), find_metrics_token(None, environment)
    assert given is not None and given.value == "from file" and str(tmp_path) in given.source
    assert said is not None and said.value == "from shell" and said.shell_word == '"$STEP128_METRICS_TOKEN"'
    assert find_metrics_token(None, {}) is None


def test_metrics_tokens_that_cannot_be_used(tmp_path: Path) -> None:
    for name, content in {"empty": "", "lines": "a\nb\n", "key": "the-key\n"}.items():
        (tmp_path / name).write_text(content)
    key = ApiKey("the-key", "the file api_key", "x")
    cases = [
        (tmp_path / "none", {}, ExitCode.INPUT_NOT_FOUND, "The metrics token file"),
        (tmp_path / "empty", {}, ExitCode.BAD_CONFIGURATION, "is empty"),
        (tmp_path / "lines", {}, ExitCode.BAD_CONFIGURATION, "one line"),
        (tmp_path / "key", {}, ExitCode.BAD_CONFIGURATION, "is the API key"),
        (None, {"STEP128_METRICS_TOKEN": ""}, ExitCode.BAD_CONFIGURATION, "variable STEP128_METRICS_TOKEN is empty"),
    ]
    for path, environment, code, text in cases:
        with pytest.raises(LauncherError, match=text) as caught:
            find_metrics_token(path, environment, key)
        assert caught.value.exit_code == code and "the-key" not in caught.value.message + caught.value.hint


def test_dry_run_names_the_token_and_does_not_show_it(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEP128_METRICS_TOKEN", "very-secret")
    arguments = ["serve", str(make_checkpoint()), "--profile", "cpu", "--memory", "4GiB", "--dry-run"]
    arguments += ["--state-dir", str(tmp_path / "state")]
    assert cli.main(arguments) == 0
    words = shlex.split(capsys.readouterr().out)
    assert "STEP128_METRICS_TOKEN=$STEP128_METRICS_TOKEN" in words and not any("very-secret" in word for word in words)
    (tmp_path / "token").write_text("other\n")
    assert cli.main([*arguments, "--metrics-token-file", str(tmp_path / "token")]) == 0
    assert f"STEP128_METRICS_TOKEN=$(cat {tmp_path}/token)" in shlex.split(capsys.readouterr().out)
