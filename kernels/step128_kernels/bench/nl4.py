"""Linear layers and routed experts in NL4, as the benchmark measures them."""

from __future__ import annotations

import torch

from step128_kernels import cases
from step128_kernels.bench.families import Place, Run, Vllm
from step128_kernels.bench.measure import Load, Task
from step128_kernels.nl4_gemm.configs import gemm_table
from step128_kernels.nl4_moe.configs import moe_config
from step128_kernels.runners import GEMM_ROUNDINGS, MOE_ROUNDINGS, gemm_runner, moe_runner
from step128_kernels.tuned.load import Config

_COUNTED_ARCH = "gfx1201"  # weights and bytes of a case are the same on every arch


class Nl4:
    """See :class:`step128_kernels.bench.families.Family`."""

    def config(self, task: Task, place: Place) -> Config:
        """By shape and rows."""
        device = torch.device(place.device)
        if task.kernel == "nl4_gemm":
            return gemm_table(task.shape["N"], task.shape["K"], device).nearest(task.m)
        return moe_config(cases.moe_shape(task.shape, task.m), device)

    def load(self, task: Task, config: Config, place: Place) -> Load:
        """Weights and their bytes with the scales."""
        case = cases.case(task.kernel, task.shape, task.m, config, _COUNTED_ARCH)
        return Load(case.weights, case.memory_bytes)

    def ours(self, task: Task, config: Config, place: Place) -> Run:
        """On made-up weights."""
        device, dtype = place.device, place.dtype
        if task.kernel == "nl4_gemm":
            return gemm_runner(task.m, task.shape["N"], task.shape["K"], config, device=device, dtype=dtype)
        return moe_runner(cases.moe_shape(task.shape, task.m), config, device=device, dtype=dtype)

    def terms(self, task: Task) -> int:
        """Of the longer of both products."""
        return max(task.shape["N"], task.shape["K"])

    def roundings(self, task: Task) -> int:
        """Of the linear layer or of both of an expert's."""
        return GEMM_ROUNDINGS if task.kernel == "nl4_gemm" else MOE_ROUNDINGS

    def rivals(self, task: Task, vllm: Vllm, place: Place) -> tuple[str, ...]:
        """Its int4 kernels."""
        return tuple(vllm.runs.opponents_here(task.kernel, task.m))

    def rival_load(self, name: str, task: Task, vllm: Vllm, place: Place) -> Load:
        """Weights in its own format."""
        return Load(*vllm.cases.baseline_load(name, task.shape, task.m))

    def rival(self, name: str, task: Task, vllm: Vllm, place: Place) -> Run:
        """On made-up weights of its own format."""
        run = vllm.runs.baseline_runner(name, task.shape, task.m, device=place.device, dtype=place.dtype)
        return run.call, run.reference

    def rival_roundings(self, task: Task, vllm: Vllm) -> int:
        """Weights and outputs."""
        return int(vllm.runs.ROUNDINGS)
