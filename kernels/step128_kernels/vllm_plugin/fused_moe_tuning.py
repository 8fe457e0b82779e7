"""vLLM's own Triton kernel for unquantized experts as something to tune: candidates, cases, and what it is checked by.

vLLM reads the resulting files itself (VLLM_TUNED_CONFIG_FOLDER). The activation between the two products is another
kernel, which no configuration changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from step128_kernels.launch import KernelCase, Launch
from step128_kernels.offline.compile import compile_launch
from step128_kernels.offline.cost import DEVICES
from step128_kernels.offline.count import count_launch
from step128_kernels.offline.inspect import LaunchReport, Report, launch_report
from step128_kernels.run_launch import run
from step128_kernels.tuned.names import VLLM_FUSED_MOE
from step128_kernels.tuned.schema import Config
from step128_kernels.vllm_plugin.fused_moe_launch import ELEMENT_BYTES, Call, down_launch, gate_up_launch

Shape = Mapping[str, int]

SHAPES: dict[str, tuple[Shape, ...]] = {
    VLLM_FUSED_MOE: tuple({"E": 240, "N": 1280 // ranks, "K": 4096, "top_k": 8} for ranks in (1, 2, 4, 8))
}
_FIRST_PREFILL_ROWS = 8  # only to name the phase: it is one kernel


def _call(shape: Shape, m: int) -> Call:
    return Call(m, shape["top_k"], shape["E"], shape["K"], shape["N"])


class MemoryBoundReport(Report):
    """A report whose time is never below what reading the weights takes, and which ranks by that time alone.

    Unquantized weights need few instructions a byte, so for few rows nearly every tile is bound by the memory. What the
    cost model assumes of waiting is too coarse to prefer one to another there: vLLM's own default wins such ties.
    """

    @property
    def modelled_seconds(self) -> float:
        """Time to issue the call or to read its weights, whichever is longer."""
        reading = self.case.memory_bytes / DEVICES[self.case.arch].memory_bytes_per_second
        return max(super().modelled_seconds, reading)

    @property
    def ranking_seconds(self) -> float:
        """The same figure, without the waiting that other reports add."""
        return self.modelled_seconds


def default_config(phase: str, m: int) -> Config:
    """Return what vLLM 0.32 takes on ROCm without a file (`get_default_config`), for up to 128 tokens an expert."""
    block_m = next((block for most, block in ((32, 16), (96, 32), (512, 64)) if m <= most), 128)
    block_n, block_k = (64, 128) if m <= 64 else (128, 64)
    return _config(phase, block_m, block_n, block_k, 4 if m <= 128 else 8)


def _config(phase: str, block_m: int, block_n: int, block_k: int, num_warps: int) -> Config:
    return {
        "phase": phase,
        "BLOCK_SIZE_M": block_m,
        "BLOCK_SIZE_N": block_n,
        "BLOCK_SIZE_K": block_k,
        "GROUP_SIZE_M": 1,
        "SPLIT_K": 1,
        "num_warps": num_warps,
        "num_stages": 2,
    }


def candidates(kernel: str, phase: str, shape: Shape, m: int, arch: str) -> Iterator[Config]:
    """vLLM's own default, then other tiles; the default is thus kept where the memory is the limit anyway."""
    if phase != ("prefill" if m >= _FIRST_PREFILL_ROWS else "decode"):
        return
    yield default_config(phase, m)
    rows = m * shape["top_k"] // shape["E"]  # of an expert
    for block_m in (16, 32, 64, 128):
        if not (block_m == 16 or block_m <= 4 * rows) or 8 * block_m < rows:
            continue
        for block_n in (64, 128):
            for block_k in (64, 128):
                yield _config(phase, block_m, block_n, block_k, 8 if block_m >= 64 else 4)


def case(kernel: str, shape: Shape, m: int, config: Config, arch: str) -> KernelCase:
    """The two products of one call.

    Raises:
        ToolEnvironmentError: if vLLM's kernel cannot be had here.

    """
    call = _call(shape, m)
    weights = call.active * 3 * call.intermediate * call.hidden
    return KernelCase(
        kernel=VLLM_FUSED_MOE,
        phase=str(config["phase"]),
        arch=arch,
        shape={"M": m, **shape},
        config={key: value for key, value in config.items() if key != "phase"},
        launches=(gate_up_launch(call, config), down_launch(call, config)),
        weights=weights,
        memory_bytes=weights * ELEMENT_BYTES,
    )


def inspect_case(case: KernelCase) -> Report:
    """Compile and count a case: one block stands for all, as all that are used take the same way through the code.

    Counting each of up to 200,000 programs would take a minute. Blocks without a pair end at once and are left out.

    Raises:
        KernelToolError: if a launch does not compile or cannot be counted.

    """
    return MemoryBoundReport(case, tuple(_inspect_launch(launch, case.arch) for launch in case.launches))


def _inspect_launch(launch: Launch, arch: str) -> LaunchReport:
    compiled = compile_launch(launch, arch)
    one = count_launch(compiled, replace(launch, grid=(1, 1, 1)))
    sizes = launch.constants
    padded = launch.loads["num_tokens_post_padded_ptr"]
    assert isinstance(padded, int)
    used = padded // sizes["BLOCK_SIZE_M"] * -(-launch.scalars["N"] // sizes["BLOCK_SIZE_N"])
    classes = tuple((counts, waves * used) for counts, waves in one.classes)
    count = replace(one, classes=classes, waves=one.waves * used, workgroups=used)
    return launch_report(launch, compiled, count, arch)


@lru_cache(maxsize=1)
def _weights(experts: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights whose products have a size near 1."""
    random = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": random, "device": "cuda", "dtype": torch.bfloat16}
    gate_up = torch.randn(experts, 2 * n, k, **options).mul_(k**-0.5)
    return gate_up, torch.randn(experts, k, n, **options).mul_(n**-0.5)


def runner(
    kernel: str, shape: Shape, m: int, config: Config
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Return both products by vLLM's kernel and by torch, on this machine's GPU; results are put into one tensor."""
    call, block = _call(shape, m), config["BLOCK_SIZE_M"]
    gate_up, down = _weights(call.experts, call.intermediate, call.hidden)
    random = torch.Generator("cuda").manual_seed(m)
    options: dict[str, Any] = {"generator": random, "device": "cuda"}
    x = torch.randn(m, call.hidden, dtype=torch.bfloat16, **options)
    hidden = torch.randn(call.pairs, call.intermediate, dtype=torch.bfloat16, **options)
    routing = torch.rand(call.pairs, **options) + 0.5
    out = torch.empty(call.pairs * (2 * call.intermediate + call.hidden), device="cuda", dtype=torch.bfloat16)
    border = call.pairs * 2 * call.intermediate
    wide, narrow = out[:border], out[border:]

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    shared = {
        "expert_ids_ptr": integers(call.block_experts(block)),
        "num_tokens_post_padded_ptr": integers([call.padded_pairs(block)]),
        "sorted_token_ids_ptr": integers(call.sorted_pairs(block)),
    }
    launches = (
        (gate_up_launch(call, config), shared | {"a_ptr": x, "b_ptr": gate_up, "c_ptr": wide}),
        (
            down_launch(call, config),
            shared | {"a_ptr": hidden, "b_ptr": down, "c_ptr": narrow, "topk_weights_ptr": routing},
        ),
    )

    def fast() -> torch.Tensor:
        for launch, tensors in launches:
            run(launch, tensors)
        return out

    def reference() -> torch.Tensor:
        first = torch.empty(call.pairs, 2 * call.intermediate, device="cuda")
        second = torch.empty(call.pairs, call.hidden, device="cuda")
        for expert in range(call.active):
            own = torch.arange(expert, call.pairs, call.active, device="cuda")
            first[own] = x[own // call.top_k].float() @ gate_up[expert].float().T
            second[own] = hidden[own].float() @ down[expert].float().T * routing[own, None]
        return torch.cat((first.flatten(), second.flatten()))

    return fast, reference
