"""Run in a process of its own: prints what vLLM's host code passes to its expert kernel, and what we say it does.

``python vllm_fused_moe_launches.py FOLDER``: FOLDER holds files for VLLM_TUNED_CONFIG_FOLDER, which vLLM also reads.
"""

import json
import os
import sys
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch

from step128_kernels.offline.inspect import Report
from step128_kernels.tuned.names import VLLM_FUSED_MOE
from step128_kernels.vllm_plugin.fused_moe_launch import Call, down_launch, gate_up_launch
from step128_kernels.vllm_plugin.fused_moe_tuning import candidates, case, default_config, inspect_case

os.environ["VLLM_TUNED_CONFIG_FOLDER"] = sys.argv[1]
CONFIG = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 32,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 2,
}
# Naive, aligned with fewer rows than a block, aligned.
CALLS = (Call(1, 8, 240, 128, 32), Call(8, 8, 240, 128, 32), Call(40, 8, 16, 128, 48))


def launch_as_said(launch: Any) -> dict[str, Any]:
    return {
        "grid": [size for size in launch.grid if size > 1] or [1],
        "arguments": launch.scalars | {key: str(value) for key, value in launch.constants.items()},
        "pointers": {name: pointer.size_bytes for name, pointer in launch.pointers.items() if name != "expert_ids_ptr"},
        "options": {"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    }


class Recorder:
    """Stands for the kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.names = [parameter.name for parameter in kernel.params]
        self.found: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*positional: Any, **named: Any) -> None:
            given = dict(zip(self.names, positional, strict=False)) | named
            options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
            pointers = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
            scalars = {"N", "K", "EM", "num_valid_tokens", *(name for name in given if name.startswith("stride_"))}
            self.found.append(
                {
                    "grid": list(grid(given)),
                    "arguments": {
                        name: value if name in scalars else str(value)
                        for name, value in given.items()
                        if name not in pointers
                    },
                    "pointers": {
                        name: value.numel() * value.element_size()
                        for name, value in pointers.items()
                        if name != "expert_ids_ptr"
                    },
                    "options": options,
                }
            )

        return launch


def launches_of_vllm(call: Call, recorder: Recorder, fused_moe: Any) -> None:
    import triton.language as tl

    sorted_ids = None if call.naive else torch.tensor(call.sorted_pairs(16), dtype=torch.int32)
    expert_ids = torch.tensor(call.block_experts(16), dtype=torch.int32)
    padded = torch.tensor([call.padded_pairs(16)], dtype=torch.int32)
    bf16 = {"dtype": torch.bfloat16}
    wide, hidden = 2 * call.intermediate, call.hidden
    products = (
        (torch.empty(call.rows, hidden, **bf16), torch.empty(call.experts, wide, hidden, **bf16), wide, False),
        (
            torch.empty(call.pairs, call.intermediate, **bf16),
            torch.empty(call.experts, hidden, call.intermediate, **bf16),
            hidden,
            True,
        ),
    )
    for a, b, n, weighted in products:
        fused_moe.invoke_fused_moe_triton_kernel(
            a,
            b,
            torch.empty(call.rows, call.top_k, n, **bf16),
            None,
            None,
            torch.empty(call.rows, call.top_k) if weighted else None,
            sorted_ids,
            expert_ids,
            padded,
            weighted,
            1 if weighted else call.top_k,
            CONFIG,
            compute_type=tl.bfloat16,
            use_fp8_w8a8=False,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
        )


def memory_bound_reports() -> list[Report]:
    """Of vLLM's default and three other tiles for one token: reading the weights takes far longer than issuing."""
    shape = {"E": 240, "N": 320, "K": 4096, "top_k": 8}
    configs = islice(candidates(VLLM_FUSED_MOE, "decode", shape, 1, "gfx1201"), 4)
    return [inspect_case(case(VLLM_FUSED_MOE, shape, 1, config, "gfx1201")) for config in configs]


def main() -> None:
    reports = memory_bound_reports()
    said = [
        launch_as_said(make(call, CONFIG | {"SPLIT_K": 1})) for call in CALLS for make in (gate_up_launch, down_launch)
    ]
    from vllm.model_executor.layers.fused_moe import fused_moe

    recorder = Recorder(fused_moe.fused_moe_kernel)
    fused_moe.fused_moe_kernel = recorder
    for call in CALLS:
        launches_of_vllm(call, recorder, fused_moe)
    fused_moe.current_platform = SimpleNamespace(is_rocm=lambda: True)
    rows = [2**power for power in range(13)]
    fused_moe.get_device_name_as_file_name = lambda: "AMD_Radeon_R9700"
    print(
        json.dumps(
            {
                "ranked": [report.ranking_seconds for report in reports],
                "with waiting": [Report(report.case, report.launches).ranking_seconds for report in reports],
                "said": said,
                "done": recorder.found,
                "naive": [
                    fused_moe._prepare_expert_assignment(
                        torch.zeros(call.rows, call.top_k, dtype=torch.int32), CONFIG, call.rows, 8, call.experts, None
                    )[0]
                    is None
                    for call in CALLS[:1]
                ],
                "default": [default_config("decode", m) for m in rows],
                "default of vLLM": [fused_moe.get_default_config(m, 240, 320, 4096, 8, None) for m in rows],
                "name": fused_moe.get_config_file_name(240, 320, None),
                "read": fused_moe.get_moe_configs(240, 320, None),
                "other": fused_moe.get_moe_configs(240, 640, None),
            }
        )
    )


main()
