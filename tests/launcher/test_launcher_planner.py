"""The planner's choices and refusals."""

import builtins
import copy
import json
import math
import os
import random
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint, read_footprint
from step128_launcher.model.model_config import read_model_config
from step128_launcher.model.quantization import Format, read_quantization
from step128_launcher.model.tensors import expected_tensors
from step128_launcher.planning.plan import DoesNotFitError, Limits
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile

MakeMachine = Callable[..., Hardware]


def test_a_roomy_machine_gets_everything(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    plan = make_plan(make_machine(), footprint, cpu_profile, Limits())
    assert (plan.max_model_len, plan.num_speculative_tokens, plan.kv_cache_dtype) == (4096, 3, "fp8")
    assert plan.prediction.kv_cache_max_concurrency >= plan.max_num_seqs
    assert any("Context 4096: the model's own maximum" in reason for reason in plan.reasons)
    assert plan.vision and plan.wish == () and plan.warnings == ()
    assert plan.rejected and all(item.missing_bytes is None for item in plan.rejected)


def test_tight_memory_shortens_the_context_and_says_so(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    profile = replace(cpu_profile, kv_cache_max_bytes=800_000)
    plan = make_plan(make_machine(), footprint, profile, Limits())
    assert 256 <= plan.max_model_len < 4096 and plan.max_model_len % 128 == 0
    rejected = {alternative.wish: alternative.reason for alternative in plan.rejected}
    assert "KiB available" in rejected["context 4096"] and "needs" in rejected["context 4096"]


def test_mtp_gives_way_to_context(footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine) -> None:
    base = Limits(vision=True, max_num_seqs=1)
    lean = make_plan(make_machine(), footprint, cpu_profile, replace(base, num_speculative_tokens=0))
    plan = make_plan(make_machine(), footprint, cpu_profile, replace(base, memory_bytes=lean.memory.total_bytes))
    assert (plan.max_model_len, plan.num_speculative_tokens) == (4096, 0)
    assert {"num_speculative_tokens 3", "num_speculative_tokens 1"} <= {item.wish for item in plan.rejected}


def test_images_give_way_to_context_and_mtp(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    text = make_plan(make_machine(), footprint, cpu_profile, Limits(vision=False, max_num_seqs=1))
    plan = make_plan(
        make_machine(), footprint, cpu_profile, Limits(memory_bytes=text.memory.total_bytes, max_num_seqs=1)
    )
    assert (plan.max_model_len, plan.num_speculative_tokens, plan.vision) == (4096, 3, False)
    assert any(warning.startswith("Text only") for warning in plan.warnings)


def test_no_mtp_layers_no_mtp(
    make_checkpoint: Callable[..., Path], nl4_format: Format, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    footprint = read_footprint(make_checkpoint(mtp=False), nl4_format)
    plan = make_plan(make_machine(), footprint, cpu_profile, Limits())
    assert plan.num_speculative_tokens == 0
    assert not any(line.name.startswith("draft") for line in plan.memory.lines)
    with pytest.raises(LauncherError, match="the checkpoint has 0"):
        make_plan(make_machine(), footprint, cpu_profile, Limits(num_speculative_tokens=1))


def test_mtp_without_scales_is_said(footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine) -> None:
    trunk = {layer: pair for layer, pair in (footprint.kv_scales or {}).items() if layer < 4}
    plan = make_plan(make_machine(), replace(footprint, kv_scales=trunk), cpu_profile, Limits())
    assert plan.kv_cache_dtype == "fp8" and any("scale 1.0" in reason for reason in plan.reasons)
    assert not any(
        "scale 1.0" in reason for reason in make_plan(make_machine(), footprint, cpu_profile, Limits()).reasons
    )


def test_two_processes_may_fill_an_image_cache(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    plan = make_plan(make_machine(), footprint, cpu_profile, Limits())
    caches = [line.total_bytes for line in plan.memory.lines if line.name.startswith("image cache, ")]
    assert caches == [cpu_profile.mm_processor_cache_bytes] * 2


def test_tensor_parallel_deals_out_the_cpus(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    plan = make_plan(make_machine(cpus=2), footprint, cpu_profile, Limits(tensor_parallel_size=2))
    assert ("VLLM_CPU_OMP_THREADS_BIND", "0|1") in plan.environment
    single = make_plan(make_machine(cpus=2), footprint, cpu_profile, Limits())
    assert ("VLLM_CPU_OMP_THREADS_BIND", "0,1") in single.environment
    many = make_plan(make_machine(cpus=8), footprint, cpu_profile, Limits())
    assert ("VLLM_CPU_OMP_THREADS_BIND", "auto") in many.environment


def test_float32_doubles_what_is_not_quantized(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    def lines(dtype: str) -> dict[str, int]:
        plan = make_plan(make_machine(), footprint, cpu_profile, Limits(dtype=dtype))
        return {line.name: line.total_bytes for line in plan.memory.lines}

    half, whole = lines("bfloat16"), lines("float32")
    assert whole["weights: embed_tokens"] == 2 * half["weights: embed_tokens"]
    assert whole["weights: attention"] == half["weights: attention"]
    assert whole["weights: router"] == half["weights: router"]


def test_images_come_before_concurrency(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine
) -> None:
    """One byte more can take requests away: the byte from which one request with images fits."""
    alone = make_plan(make_machine(), footprint, cpu_profile, Limits(vision=True, max_num_seqs=1))
    enough = alone.memory.total_bytes
    less, more = (
        make_plan(make_machine(), footprint, cpu_profile, Limits(memory_bytes=size)) for size in (enough - 1, enough)
    )
    assert (less.max_model_len, less.num_speculative_tokens) == (more.max_model_len, more.num_speculative_tokens)
    assert (less.vision, less.max_num_seqs) == (False, cpu_profile.max_num_seqs)
    assert (more.vision, more.max_num_seqs) == (True, 1)
    assert less.prediction.num_gpu_blocks > more.prediction.num_gpu_blocks
    text = next(item.reason for item in more.rejected if item.wish == "text only")
    assert "for the KV cache" in text


def test_the_plan_depends_on_its_arguments_alone(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned once more where every look at the machine, the clock or the environment is an error."""
    arguments = (make_machine(), footprint, cpu_profile, Limits())
    before, plan = copy.deepcopy(arguments), make_plan(*arguments)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the planner looked outside")

    with monkeypatch.context() as patch:
        for owner, names in (
            (os, ("open", "stat", "listdir", "getenv", "getpid", "cpu_count", "sched_getaffinity")),
            (time, ("time", "monotonic", "perf_counter")),
            (random, ("random", "randrange")),
            (builtins, ("open", "print")),
            (Path, ("open", "read_text", "exists")),
        ):
            for name in names:
                patch.setattr(owner, name, forbidden)
        patch.setattr(os, "environ", None)
        again = make_plan(*arguments)
    assert again == plan and arguments == before


def test_the_real_size_model(
    real_config: dict[str, Any],
    all_linears: dict[str, Any],
    nl4_format: Format,
    cpu_profile: Profile,
    make_machine: MakeMachine,
    tmp_path: Path,
) -> None:
    """240 experts, policy all-linears, as sparse files: the weights' bytes by closed form, and a refusal on 16 GiB."""
    real_config["quantization_config"] = all_linears
    (tmp_path / "config.json").write_text(json.dumps(real_config))
    config = read_model_config(tmp_path)
    quantization = read_quantization(tmp_path / "config.json", config.quantization_config, nl4_format)
    header: dict[str, Any] = {}
    end = 0
    for tensor in expected_tensors(config, nl4_format, quantization).values():
        dtype, size = {"packed": ("U8", 1), "scale": ("F16", 2)}.get(tensor.role, ("BF16", 2))
        start, end = end, end + math.prod(tensor.shape) * size
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(shard, 8 + len(raw) + end)

    footprint = read_footprint(tmp_path, nl4_format)
    plan = make_plan(make_machine(256.0, 16), footprint, cpu_profile, Limits(max_model_len=32768))
    weights = sum(line.total_bytes for line in plan.memory.lines if line.name.startswith(("weights", "draft:")))
    quantized = 158_544_691_200 + 905_969_664 + 3_598_712_832 + 415_236_096 + 660_602_880  # experts, attention, MLPs
    quantized += 527_958_016 + 742_391_808 + 1_583_874_048  # lm_head, MTP block linears, MTP heads
    router = 41_297_760
    assert weights == quantized * 5 // 8 + router * 4 + (169_648_118_368 - quantized - router) * 2
    assert {line.name: line.total_bytes for line in plan.memory.lines}["rope tables"] == pytest.approx(
        142.5 * 2**20, rel=0.001
    )
    with pytest.raises(DoesNotFitError, match="GiB missing"):
        make_plan(make_machine(16.0), footprint, cpu_profile, Limits())
