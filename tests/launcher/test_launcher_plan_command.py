"""`step128 plan` for recorded machines, from config.json alone: documents, commands, explanations, exit codes."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step128_launcher import cli
from step128_launcher.commands import plan_json, planned
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.errors import ExitCode
from step128_launcher.model import checkpoint

MACHINES = Path(__file__).parents[1] / "machines"
REAL_MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile, state or calibration of whoever runs the tests."""
    for name in ("STEP128_PROFILE", "STEP128_PROFILES_DIR", "NCCL_PROTO", "NCCL_P2P_DISABLE", "VLLM_ROCM_USE_AITER"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `step128 plan` on a recorded machine; exit status, output, errors."""

    def plan(*arguments: str, machine: str = "quad-r9700", policy: str = "all-linears") -> tuple[int, str, str]:
        common = ["plan", "--machine", str(MACHINES / machine), "--policy", policy]
        try:
            code = cli.main([*common, *arguments])
        except SystemExit as error:  # argparse ends the process
            code = int(error.code or 0)
        output = capsys.readouterr()
        assert "Traceback" not in output.out + output.err
        return code, output.out, output.err

    return plan


def test_our_tuned_configs_go_to_vllm(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(find_configs_dir({}), configs, ignore=shutil.ignore_patterns("tuned"))
    monkeypatch.setenv("STEP128_CONFIGS_DIR", str(configs))

    def folder() -> str | None:
        value: str | None = json.loads(run(str(REAL_MODEL), "--json")[1])["environment"].get("VLLM_TUNED_CONFIG_FOLDER")
        return value

    assert folder() is None
    (configs / "tuned/vllm").mkdir(parents=True)
    assert folder() == str(configs / "tuned/vllm")


def test_own_tuned_configs_go_before_ours(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs, own = tmp_path / "configs", tmp_path / "own"
    shutil.copytree(find_configs_dir({}), configs, ignore=shutil.ignore_patterns("tuned"))
    (configs / "tuned/vllm").mkdir(parents=True)
    monkeypatch.setenv("STEP128_CONFIGS_DIR", str(configs))
    monkeypatch.setenv("STEP128_TUNED_DIR", str(own))
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    quad = planned.probe(MACHINES / "quad-r9700", {})
    monkeypatch.setattr(planned, "probe", lambda *_: quad)

    def folder() -> str | None:
        assert cli.main(["plan", "--policy", "all-linears", "--json", str(REAL_MODEL)]) == 0
        value: str | None = json.loads(capsys.readouterr().out)["environment"].get("VLLM_TUNED_CONFIG_FOLDER")
        return value

    assert folder() == str(configs / "tuned/vllm")
    (own / "vllm").mkdir(parents=True)
    assert folder() == str(own / "vllm")
    recorded = json.loads(run(str(REAL_MODEL), "--json")[1])["environment"]
    assert recorded["VLLM_TUNED_CONFIG_FOLDER"] == str(configs / "tuned/vllm")
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "/mine")
    assert folder() is None  # not changed


def documented(text: str) -> dict[str, Any]:
    """The keys of a sentence such as `a, b {c, d [{e}]}` as nested mappings; None where no keys are given."""
    keys: dict[str, Any] = {}
    depth, item = 0, ""
    for mark in text + ",":
        depth += (mark in "{[") - (mark in "}]")
        if mark != "," or depth:
            item += mark
            continue
        name = re.match(r"\s*(\w+)", item)
        inner = re.search(r"\{(.*)\}", item, re.DOTALL)
        if name:
            keys[name[1]] = documented(inner[1]) if inner else None
        item = ""
    return keys


def keys_of(value: Any, wanted: dict[str, Any] | None) -> Any:
    """The keys of a document, as deep as `wanted` goes."""
    if isinstance(value, list):
        value = value[0] if value else {}
    if wanted is None or not isinstance(value, dict):
        return None
    return {name: keys_of(inner, wanted.get(name)) for name, inner in value.items()}


def test_the_document_is_the_documented_one(run: Run) -> None:
    text = str(plan_json.__doc__).partition("one JSON object:")[2].partition("An error gives")[0]
    text = re.sub(r"\([^()]*\)", "", text).replace(" and ", ", ").strip().removesuffix(".")
    wanted = documented(text)
    free = ("speed_sources", "environment")  # their keys are inputs and variables
    wanted |= dict.fromkeys(free)
    code, out, _ = run(str(REAL_MODEL), "--json")
    document = json.loads(out)
    assert code == 0 and document["schema"] == plan_json.SCHEMA == 2
    wanted["memory"] = wanted["host_memory"]  # described once
    assert wanted["settings"] and wanted["memory"]["lines"] and wanted["speed"] and wanted["machine"]["gpus"]
    assert keys_of(document, wanted) == wanted
    assert document["model"]["assumed"] and document["model"]["policy"] == "all-linears"
    _, out, _ = run(str(REAL_MODEL), "--json", machine="single-r9700")
    refusal = json.loads(out)
    about = {"profile", "model", "machine", "memory", "host_memory", "rejected", "remedies"}
    assert set(refusal) == {"schema", "error", "hint", "exit_code", "result", *about}
    assert refusal["result"] == "does not fit" and refusal["profile"] == "single-r9700"
    assert keys_of(refusal["memory"], wanted["memory"]) == wanted["memory"]
    assert keys_of(refusal["host_memory"], wanted["memory"]) == wanted["memory"]
    assert refusal["host_memory"]["available_bytes"] < refusal["host_memory"]["total_memory_bytes"]
    assert keys_of(refusal["machine"], wanted["machine"]) == wanted["machine"]
    del wanted["model"]["served_model_name"]
    assert keys_of(refusal["model"], wanted["model"]) == wanted["model"]
    assert len(refusal["remedies"]) > 1 and "four such cards" in refusal["remedies"][-1]
    assert all(remedy in refusal["hint"] for remedy in refusal["remedies"])


def test_a_refusal_says_as_much_as_a_plan(run: Run) -> None:
    fits = run(str(REAL_MODEL))[1].splitlines()
    code, out, refusal = run(str(REAL_MODEL), machine="single-r9700")
    lines = refusal.splitlines()
    assert code == ExitCode.DOES_NOT_FIT and out == ""
    assert lines[:2] == fits[:2] and lines[0].startswith("Model    ")
    assert lines[2].startswith("Machine  1 x AMD Radeon AI PRO R9700") and lines[2].endswith("profile single-r9700")
    result = next(
        i for i, line in enumerate(lines) if line.startswith("RESULT   does not fit: a context of 4096 tokens")
    )
    assert lines[result + 1 :] and all(line.startswith("TRY      ") for line in lines[result + 1 :])
    assert any(line.startswith("  - tensor parallel 1, ") for line in lines[:result])


def test_settings_have_vllm_s_names(run: Run) -> None:
    """Each is an argument of vLLM's engine, but what step128 decides itself and what vLLM takes in another unit."""
    from vllm.engine.arg_utils import EngineArgs

    settings = json.loads(run(str(REAL_MODEL), "--json")[1])["settings"]
    ours = {"vision", "num_speculative_tokens", "mm_processor_cache_bytes"}
    assert {name for name in settings if not hasattr(EngineArgs, name)} == ours


ARGV = """-m vllm.entrypoints.openai.api_server --model MODEL --served-model-name step-3.7-flash-240
    --host 127.0.0.1 --port 8000 --load-format step128 --dtype bfloat16 --max-model-len 204800 --block-size 16
    --kv-cache-dtype fp8 --gpu-memory-utilization 0.91 --kv-cache-memory-bytes 1505525760
    --max-num-seqs 16 --max-num-batched-tokens 2048 --tensor-parallel-size 4
    --reasoning-parser step3p5 --enable-auto-tool-choice --tool-call-parser step3p5
    --shutdown-timeout 60 --mm-processor-cache-gb 1.0 --disable-uvicorn-access-log --disable-fastapi-docs
    --middleware step128_launcher.middleware.Guard --no-enable-log-requests --max-log-len 0
    --speculative-config '{"method": "mtp", "num_speculative_tokens": 3, "attention_backend": "CUSTOM"}'
    --attention-backend CUSTOM --limit-mm-per-prompt '{"image": 16}'
    --disable-cascade-attn --mm-encoder-attn-backend=TRITON_ATTN --disable-custom-all-reduce"""
ENVIRONMENT = {
    "STEP128_LOAD_REPORT_DIR": "STATE/load-reports",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
    "STEP128_ACCESS": '{"max_body_bytes":67108864,"max_tokens":204800,"max_images":16,"max_image_bytes":33554432,'
    '"max_image_pixels":50000000,"media_domains":[]}',
    "VLLM_MAX_IMAGE_PIXELS": "50000000",
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "32",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    "NCCL_PROTO": "Simple",
    "NCCL_P2P_DISABLE": "1",
    "VLLM_ROCM_USE_AITER": "0",
}


def test_the_exact_command_on_four_r9700(run: Run) -> None:
    code, out, _ = run(str(REAL_MODEL), "--dry-run", "--state-dir", "/STATE")
    words = shlex.split(out)
    start = words.index(sys.executable)
    assert code == 0 and words[start + 1 :] == shlex.split(ARGV.replace("MODEL", str(REAL_MODEL)))
    assignments = dict(word.split("=", 1) for word in words[1:start] if "=" in word)
    assert assignments.pop("VLLM_API_KEY") == "$(cat /STATE/api_key)"
    tuned = str(find_configs_dir({}).absolute() / "tuned/vllm")
    added = {"STEP128_LOAD_REPORT_DIR": "/STATE/load-reports", "VLLM_TUNED_CONFIG_FOLDER": tuned}
    assert assignments == ENVIRONMENT | added
    document = json.loads(run(str(REAL_MODEL), "--json", "--state-dir", "/STATE")[1])
    assert document["argv"] == words[start:] and document["environment"] == assignments


def test_a_recorded_machine_is_not_mixed_with_this_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this shell's variables nor this machine's calibration say anything about another machine."""
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    monkeypatch.setattr(planned, "load_calibration", lambda *_: pytest.fail("a calibration was read"))
    assert json.loads(run(str(REAL_MODEL), "--json")[1])["environment"]["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_DISABLE=1" in run(str(REAL_MODEL), "--dry-run")[1]


def test_the_checkpoint_s_chat_template_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((REAL_MODEL / "config.json").read_text())
    assert "--chat-template" not in run(str(tmp_path), "--dry-run")[1]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    words = shlex.split(run(str(tmp_path), "--dry-run")[1])
    assert words[words.index("--chat-template") + 1] == str(tmp_path / "chat_template.jinja")


def test_text_only_serves_no_images(run: Run) -> None:
    argv = json.loads(run(str(REAL_MODEL), "--json", "--no-vision")[1])["argv"]
    assert argv[argv.index("--limit-mm-per-prompt") + 1] == '{"image": 0}'
    assert argv[argv.index("--mm-processor-cache-gb") + 1] == "0.0"


def test_candidates(run: Run) -> None:
    document = json.loads(run(str(REAL_MODEL), "--json", "--candidates")[1])
    assert len(document["candidates"]) == document["considered"]
    assert all(entry["reason"] or not entry["missing_bytes"] for entry in document["candidates"])
    assert run(str(REAL_MODEL), "--candidates")[0] == ExitCode.USAGE


def test_no_shard_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "read_shards", lambda folder: pytest.fail("a shard was read"))
    code, out, _ = run(str(REAL_MODEL))
    assert code == 0 and "WARNING  No shard was read" in out and "RESULT   fits: context 204800, MTP 3" in out


CODES: list[tuple[list[str], str, int, str]] = [
    ([], "quad-r9700", 0, ""),
    ([], "single-r9700", 3, "four such cards"),
    ([], "gpu-node", 4, "No profile is for this machine"),
    (["--profile", "strix-halo-128"], "quad-r9700", 4, "is for gfx1151"),
    (["--tensor-parallel-size", "8"], "quad-r9700", 4, "needs 8 GPUs"),
    (["--profile", "tpu"], "quad-r9700", 78, "no profile 'tpu'"),
    (["--policy", "everything"], "quad-r9700", 78, "no quantization policy 'everything'"),
    (["--machine", "/nowhere"], "quad-r9700", 66, "/nowhere is no folder"),
    (["--machine", "/dev/null"], "quad-r9700", 66, "is no folder"),
    (["--machine", str(REAL_MODEL)], "quad-r9700", 4, "does not give MemTotal"),
    (["--pipeline-parallel-size", "2"], "quad-r9700", 2, "vLLM refuses pipeline parallelism"),
    (["--tensor-parallel-size", "3"], "quad-r9700", 2, "do not divide"),
    (["--max-model-len", "262145"], "quad-r9700", 2, "above the model's own maximum"),
    (["--num-speculative-tokens", "4"], "quad-r9700", 2, "invalid choice"),
    (["--attention-backend", "FLASH_ATTN"], "quad-r9700", 2, "known there: CUSTOM, TRITON_ATTN, ROCM_ATTN"),
    (["--block-size", "8"], "quad-r9700", 2, "multiple of 16"),
    (["--acceptance", "0.9,1.1"], "quad-r9700", 2, "from 0 to 1"),
    (["--acceptance", "nan"], "quad-r9700", 2, "from 0 to 1"),
    (["--objective", "everything"], "quad-r9700", 2, "invalid choice"),
    (["--max-num-seqs", "100000"], "quad-r9700", 2, "max_num_batched_tokens 2048 (of profile quad-r9700) is below"),
    (["--memory", "1B"], "quad-r9700", 3, "1 B may be used"),
    (["--memory", "900GiB"], "quad-r9700", 3, "--memory 900.00 GiB is above the 31.80 GiB available"),
    (["--attention-backend", "ROCM_ATTN", "--kv-cache-dtype", "fp8"], "quad-r9700", 2, "ROCM_ATTN is not for"),
    (["--attention-backend", "ROCM_ATTN", "--max-model-len", "200000"], "quad-r9700", 2, "ROCM_ATTN is for contexts"),
    (["--profile", "cpu"], "quad-r9700", 3, "102.00 GiB may be used"),
    (["--enable-expert-parallel"], "quad-r9700", 0, ""),
    (["--dtype", "float32"], "quad-48gb", 2, "--attention-backend TRITON_ATTN"),
    (["--dtype", "float32", "--attention-backend", "TRITON_ATTN"], "quad-48gb", 0, ""),
]


@pytest.mark.parametrize(("arguments", "machine", "code", "text"), CODES)
def test_exit_codes(arguments: list[str], machine: str, code: int, text: str, run: Run) -> None:
    found, out, err = run(str(REAL_MODEL), *arguments, machine=machine)
    assert found == code and text in err and (out == "") == (code != 0)


def test_models_that_are_not_there_or_broken(run: Run, tmp_path: Path) -> None:
    assert run(str(tmp_path / "none"))[0] == ExitCode.INPUT_NOT_FOUND
    (tmp_path / "config.json").write_bytes(b"\xff{")
    assert run(str(tmp_path))[0] == ExitCode.BAD_CHECKPOINT
    assert run(str(tmp_path / "config.json"))[0] in (ExitCode.INPUT_NOT_FOUND, ExitCode.BAD_CHECKPOINT)
    assert cli.main(["plan", str(REAL_MODEL), "--machine", str(MACHINES / "no-gpu")]) == ExitCode.BAD_CHECKPOINT


def test_a_plan_for_a_gpu_says_that_our_kernels_were_not_measured_there(run: Run) -> None:
    warnings = json.loads(run(str(REAL_MODEL), "--json")[1])["warnings"]
    assert [text for text in warnings if "NL4 and attention kernels have not run on gfx1201 here" in text]
