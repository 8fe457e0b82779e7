"""What the doctor reads from vLLM's log, and that vLLM 0.32 still writes it so."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from step128_launcher.doctor import Finding, run_doctor, server_log
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe
from step128_launcher.planning.profiles import load_profile

MACHINES = Path(__file__).parents[2] / "machines"
QUAD, SPARK = "quad-r9700", "dgx-spark"
PREFIX = "(Worker_TP0 pid=71) INFO 11-23 16:30:00 [rocm.py:849] "
NAMED = "Using ROCM_ATTN backend (selected via --attention-backend)."
POTENTIAL = "Using {} backend out of potential backends: ['ROCM_ATTN', 'TRITON_ATTN']."
OVERRIDDEN = (
    "Found incompatible backend(s) [TRITON_ATTN] with decoder. Overriding with ROCM_ATTN out of potential backends: []."
)
MOE = (
    "Using default MoE config. Performance might be sub-optimal! Config file not found at "
    "/c/E=240,N=320,device_name=AMD-gfx1201.json"
)


@pytest.mark.parametrize(
    ("check", "tree", "line", "outcome", "word"),
    [
        (server_log.check_logged_attention, QUAD, NAMED, "FAIL", "gfx1201"),
        (server_log.check_logged_attention, QUAD, POTENTIAL.format("ROCM_ATTN"), "FAIL", "CUSTOM"),
        (server_log.check_logged_attention, QUAD, OVERRIDDEN, "FAIL", "ROCM_ATTN, by"),
        (server_log.check_logged_attention, QUAD, POTENTIAL.format("TRITON_ATTN"), "PASS", "TRITON_ATTN, by"),
        (server_log.check_logged_attention, QUAD, NAMED.replace("ROCM_ATTN", "CUSTOM"), "PASS", "CUSTOM, by"),
        (server_log.check_logged_attention, SPARK, "Using AttentionBackendEnum.FLASHINFER backend.", "PASS", "FLASHI"),
        (
            server_log.check_logged_attention,
            SPARK,
            "Using FLASH_ATTN attention backend out of potential backends: [].",
            "PASS",
            "FLASH_ATTN",
        ),
        (
            server_log.check_logged_attention,
            QUAD,
            "Using TRITON Fp8 MoE backend out of potential backends: [].",
            "SKIP",
            "names no",
        ),
        (server_log.check_logged_vision, QUAD, "Using Torch SDPA backend for ViT model.", "WARN", "TRITON_ATTN"),
        (
            server_log.check_logged_vision,
            QUAD,
            "Using backend AttentionBackendEnum.TORCH_SDPA for vit attention",
            "WARN",
            "TORCH_SDPA",
        ),
        (
            server_log.check_logged_vision,
            QUAD,
            "Using AttentionBackendEnum.TRITON_ATTN for MMEncoderAttention.",
            "PASS",
            "TRITON",
        ),
        (server_log.check_logged_vision, QUAD, NAMED, "SKIP", "names no"),
        (server_log.check_logged_experts, QUAD, MOE, "WARN", "N=320,device_name=AMD-gfx1201.json"),
        (server_log.check_logged_experts, QUAD, "Using configuration from x.json for MoE layer.", "PASS", "not say"),
    ],
)
def test_lines_of_a_log(
    context: Callable[..., Context],
    tmp_path: Path,
    check: Callable[[Context], Finding],
    tree: str,
    line: str,
    outcome: str,
    word: str,
) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(f"\x1b[32m{PREFIX}\x1b[0m{line}\n".encode() + b"\xff\n")
    found = check(context(tree, log=log))
    assert found.outcome == outcome and word in found.evidence + found.remedy, found
    assert check(context(tree)).outcome == check(context(tree, log=tmp_path / "none")).outcome == "SKIP"


def test_only_the_last_start_counts(context: Callable[..., Context], tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    start = "INFO vLLM API server version 0.32.0\n"
    log.write_text(f"{start}{PREFIX}{NAMED}\n{start}{PREFIX}{POTENTIAL.format('TRITON_ATTN')}\n")
    assert server_log.check_logged_attention(context(QUAD, log=log)).outcome == "PASS"


@pytest.mark.parametrize(
    ("served", "outcome"), [(("CUSTOM",), "PASS"), (("TRITON_ATTN",), "WARN"), (("CUSTOM", "TRITON_ATTN"), "WARN")]
)
def test_the_profile_s_first_backend_must_have_served(
    context: Callable[..., Context], configs_dir: Path, tmp_path: Path, served: tuple[str, ...], outcome: str
) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("".join(f"{PREFIX}{NAMED.replace('ROCM_ATTN', name)}\n" for name in served))
    profile = load_profile(configs_dir, QUAD)
    found = server_log.check_logged_attention(context(QUAD, profile=profile, log=log))
    assert found.outcome == outcome and ", ".join(served) in found.evidence
    assert (outcome == "PASS") != ("profile quad-r9700 names CUSTOM first" in found.evidence)


def test_the_newest_log_is_found(tmp_path: Path) -> None:
    assert server_log.find_log({"XDG_STATE_HOME": str(tmp_path)}) is None
    for port, time in ((8000, 2000), (8001, 1000)):
        log = tmp_path / ".local/state/step128" / str(port) / "vllm.log"
        log.parent.mkdir(parents=True)
        log.touch()
        os.utime(log, (time, time))
    found = server_log.find_log({"HOME": str(tmp_path)})
    assert found is not None and found.parent.name == "8000"


def test_the_doctor_takes_a_log(configs_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(f"{PREFIX}{NAMED}\n{MOE}\n")
    found = run_doctor(
        probe(MACHINES / QUAD, {}),
        None,
        {},
        configs_dir=configs_dir,
        model=None,
        all_reduce=False,
        root=MACHINES / QUAD,
        log=log,
    )
    outcomes = {one.check: one.outcome for one in found}
    assert (outcomes["log-attention"], outcomes["log-experts"]) == ("FAIL", "WARN")


def test_vllm_writes_these_lines() -> None:
    """The texts in the installed vLLM's source: a release that words them otherwise must be noticed here."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    for file, texts in {
        "platforms/rocm.py": (
            '"Using %s backend (selected via --attention-backend)."',
            '"Using %s backend out of potential backends: %s."',
            '"Overriding with %s out of potential backends: %s."',
            '"Using Torch SDPA backend for ViT model."',
            "Using backend {backend} for vit attention",
        ),
        "platforms/cuda.py": ('"Using %s attention backend out of potential backends: %s."', '"Using %s backend."'),
        "model_executor/layers/attention/mm_encoder_attention.py": (
            "Using {self.attn_backend} for MMEncoderAttention",
        ),
        "model_executor/layers/fused_moe/fused_moe.py": (
            '"Using default MoE config. Performance might be sub-optimal! "',
            '"Config file not found at %s"',
        ),
    }.items():
        source = (Path(spec.origin).parent / file).read_text()
        assert all(text in source for text in texts), file
