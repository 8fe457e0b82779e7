"""The exact argv and environment, the API key, and the command line."""

import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from step128_launcher.api_key import find_api_key
from step128_launcher.command import Server, environment_changes, server_argv, server_environment
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.plan import Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile
from step128_launcher.supervisor.preflight import check_port_free

SERVER = Server(Path("/models/m"), "m", "127.0.0.1", 8000, Path("/state/load-reports"), 20)


@pytest.fixture
def plan(footprint: ModelFootprint, cpu_profile: Profile, make_machine: Callable[..., Hardware]) -> Plan:
    return make_plan(make_machine(cpus=2), footprint, cpu_profile, Limits())


def test_argv(plan: Plan) -> None:
    wanted = f"""--model /models/m --served-model-name m --host 127.0.0.1 --port 8000 --load-format step128
        --dtype bfloat16 --max-model-len 4096 --block-size 128 --kv-cache-dtype fp8
        --kv-cache-memory-bytes {plan.kv_cache_memory_bytes} --max-num-seqs 8 --max-num-batched-tokens 1024
        --tensor-parallel-size 1 --reasoning-parser step3p5 --enable-auto-tool-choice --tool-call-parser step3p5
        --shutdown-timeout 20 --mm-processor-cache-gb 0.25 --disable-uvicorn-access-log --disable-fastapi-docs
        --middleware step128_launcher.middleware.Guard --no-enable-log-requests --max-log-len 0
        --speculative-config""".split()
    wanted += ['{"method": "mtp", "num_speculative_tokens": 3}', "--enforce-eager"]
    wanted += ["--limit-mm-per-prompt", '{"image": 16}']
    assert server_argv(plan, SERVER) == (sys.executable, "-m", "vllm.entrypoints.openai.api_server", *wanted)


def test_argv_without_mtp_and_eager(plan: Plan) -> None:
    argv = server_argv(replace(plan, num_speculative_tokens=0, enforce_eager=False), SERVER)
    assert "--speculative-config" not in argv and "--enforce-eager" not in argv


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("machine", ["quad-r9700", "quad-48gb", "strix-halo-128-gtt120", "dgx-spark", "jetson-thor"])
def test_vllm_knows_every_flag_of_the_profiles(
    machine: str,
    measure: bool,
    recorded: Callable[[str], Hardware],
    profile_of: Callable[[str], Profile],
    real_model: Callable[[str | None], ModelFootprint],
) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    profile = profile_of("strix-halo-128" if machine.startswith("strix") else machine)
    plan = make_plan(recorded(machine), real_model("all-linears"), profile, Limits())
    argv = list(server_argv(plan, replace(SERVER, measure_memory=measure))[3:])
    argv[argv.index("--load-format") + 1] = "auto"
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    assert parsed.attention_backend == plan.attention_backend and parsed.disable_cascade_attn
    # Its argparse takes any text here; the names are checked when the engine starts.
    assert all(AttentionBackendEnum[backend.name] for backend in profile.attention_backends)
    assert parsed.mm_encoder_attn_backend is None or AttentionBackendEnum[parsed.mm_encoder_attn_backend]
    assert parsed.kv_cache_memory_bytes == (None if measure else plan.kv_cache_memory_bytes)
    share = plan.measuring_utilization if measure else plan.gpu_memory_utilization
    assert parsed.gpu_memory_utilization == pytest.approx(share, abs=1e-9)


def test_vllm_knows_every_flag(plan: Plan) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    argv = list(server_argv(plan, SERVER)[3:])
    argv[argv.index("--load-format") + 1] = "auto"  # ours is registered by the plugin, in vLLM's own processes
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    assert parsed.kv_cache_memory_bytes == plan.kv_cache_memory_bytes
    assert parsed.shutdown_timeout == 20 and parsed.api_key is None
    assert parsed.mm_processor_cache_gb * 2**30 == plan.mm_processor_cache_bytes


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:8000"),
        ("::1", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_where_the_server_is_asked(host: str, url: str) -> None:
    assert replace(SERVER, host=host).base_url == url


@pytest.mark.parametrize("host", ["a" * 70, "203.0.113.1"])
def test_hosts_that_are_not_ours(host: str) -> None:
    with pytest.raises(LauncherError) as caught:
        check_port_free(host, 8000)
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION


def test_environment(plan: Plan) -> None:
    base = {"PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "4", "STEP128_API_KEY": "secret", "VLLM_PLUGINS": "a, step128"}
    environment = server_environment(base, plan, SERVER, "secret")
    assert environment == {
        "PATH": "/bin",
        "VLLM_PLUGINS": "a, step128",
        "VLLM_API_KEY": "secret",
        "STEP128_LOAD_REPORT_DIR": "/state/load-reports",
        "VLLM_CPU_OMP_THREADS_BIND": "0,1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        "STEP128_ACCESS": '{"max_body_bytes":67108864,"max_tokens":4096,"max_images":16,"max_image_bytes":33554432,'
        '"max_image_pixels":50000000,"media_domains":[]}',
        "VLLM_MAX_IMAGE_PIXELS": "50000000",
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "32",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }
    assert "secret" not in " ".join(server_argv(plan, SERVER))


def test_tuned_configs_go_to_vllm_on_a_gpu_unless_the_user_names_others(plan: Plan) -> None:
    name, server = "VLLM_TUNED_CONFIG_FOLDER", replace(SERVER, tuned_configs=Path("/configs/tuned/vllm"))
    gpu = replace(plan, device="rocm", environment=())
    assert environment_changes(gpu, server, {})[name] == "/configs/tuned/vllm"
    assert name not in environment_changes(gpu, SERVER, {})
    assert name not in environment_changes(plan, server, {})
    assert server_environment({name: "/mine"}, gpu, server, "k")[name] == "/mine"
    profiled = replace(gpu, environment=((name, "/profile"),))
    assert environment_changes(profiled, server, {})[name] == "/profile"


@pytest.mark.parametrize("plugins", ["", "other", "step1289"])
def test_a_plugin_list_without_ours_is_refused(plugins: str, plan: Plan) -> None:
    with pytest.raises(LauncherError, match="VLLM_PLUGINS") as caught:
        server_environment({"VLLM_PLUGINS": plugins}, plan, SERVER, "k")
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION


def test_a_generated_key_is_private_and_kept(tmp_path: Path) -> None:
    first = find_api_key(None, {}, tmp_path)
    path = tmp_path / "api_key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(first.value) >= 32 and str(path) in first.source and first.value not in repr(first)
    assert find_api_key(None, {}, tmp_path) == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["api_key"]


def test_where_a_key_comes_from(tmp_path: Path) -> None:
    environment = {"STEP128_API_KEY": "ours", "VLLM_API_KEY": "theirs"}
    given = tmp_path / "given"
    given.write_text("from file\n")
    assert find_api_key(given, environment, tmp_path).value == "from file"
    assert find_api_key(None, environment, tmp_path).value == "ours"
    assert find_api_key(None, {"VLLM_API_KEY": "theirs"}, tmp_path).value == "theirs"


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "two lines").write_text("one\ntwo\n")
    cases = [
        (tmp_path / "none", {}, ExitCode.INPUT_NOT_FOUND),
        (tmp_path / "empty", {}, ExitCode.BAD_CONFIGURATION),
        (None, {"VLLM_API_KEY": " "}, ExitCode.BAD_CONFIGURATION),
        (tmp_path, {}, ExitCode.BAD_CONFIGURATION),
        (tmp_path / "binary", {}, ExitCode.BAD_CONFIGURATION),
        (tmp_path / "two lines", {}, ExitCode.BAD_CONFIGURATION),
        (None, {"STEP128_API_KEY": "schlüssel"}, ExitCode.BAD_CONFIGURATION),
        (None, {"STEP128_API_KEY": "tab\tin it"}, ExitCode.BAD_CONFIGURATION),
        (None, {"VLLM_API_KEY": "not utf-8: \udcff"}, ExitCode.BAD_CONFIGURATION),
    ]
    for key_file, environment, code in cases:
        with pytest.raises(LauncherError) as caught:
            find_api_key(key_file, environment, tmp_path)
        assert caught.value.exit_code == code
