"""vLLM's own 4-bit kernels as cases to compile and to count: what ours are compared with.

* ``vllm_moe_wna16``: ``fused_moe_kernel_gptq_awq``, the only Triton kernel of vLLM 0.32 for int4 experts, and on these
  GPUs the only one at all. Two launches, w13 (gate and up) and w2 (down); vLLM's alignment, activation and sum are C++
  and are left out, in its favour.
* ``vllm_w4a16``: ``triton_w4a16_gemm_kernel``, its Triton kernel for int4 linear layers.
* ``vllm_w4a16_rdna``: ``_triton_w4a16_skinny_fmt_kernel``, the Triton half of what vLLM prefers on RDNA. It serves more
  than 5 rows; for up to 5 vLLM runs a HIP kernel there. That one is in no wheel for other machines, so it cannot be
  compiled and counted; it is timed where it is (:mod:`~step128_kernels.vllm_plugin.baselines_run`).

Block sizes, grids and all arguments are those that vLLM's own launch code picks for the GPU asked about: that code is
run, with tensors that have a shape and no memory (:mod:`~step128_kernels.vllm_plugin.baselines_source`). It finds no
tuned file for 240 experts (vLLM ships none), so these are its defaults.

vLLM's kernels take groups of 32 weights with a bfloat16 scale, ours 16 with a float16 one: 4.5 bits per weight against
5.0. Counts and times are therefore compared per weight, never per byte.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from step128_kernels.launch import KernelCase, Launch
from step128_kernels.vllm_plugin.baselines_launch import (
    GROUP_SIZE,
    LINEAR_KERNELS,
    empty_blocks,
    launch_part,
    linear_launcher,
    linear_shapes,
    moe_kernel,
    moe_launcher,
    moe_options,
    no_zeros,
    part_shapes,
)
from step128_kernels.vllm_plugin.baselines_source import Platform, Recorder

OPPONENTS = {"nl4_moe": ("vllm_moe_wna16",), "nl4_gemm": LINEAR_KERNELS}
"""What each of our kernels is compared with."""

_RDNA_LEAST_ROWS = 6  # MAX_SKINNY_BATCH_SIZE + 1
_BITS_PER_WEIGHT = 4 + 16 / GROUP_SIZE
_META = torch.device("meta")
_PARTS = ("w13", "w2")


def opponents(kernel: str, m: int) -> tuple[str, ...]:
    """Triton kernels of vLLM that do the work of one of ours for ``m`` rows."""
    return tuple(name for name in OPPONENTS[kernel] if name != "vllm_w4a16_rdna" or m >= _RDNA_LEAST_ROWS)


def baseline_case(kernel: str, shape: Mapping[str, int], m: int, arch: str, part: str | None = None) -> KernelCase:
    """All Triton launches of one call, with the experts chosen as evenly as can be, as in our own cases.

    Args:
        kernel: one of the names above, or of ours: then the first of its opponents.
        shape: as in :data:`step128_kernels.cases.SHAPES`.
        m: activation rows.
        arch: "gfx1201" or "gfx1151".
        part: "w13" or "w2", only this launch of the experts.
    """
    name = OPPONENTS[kernel][0] if kernel in OPPONENTS else kernel
    if name == "vllm_moe_wna16":
        launches = tuple(_moe_launch(shape, m, arch, one) for one in _PARTS if part in (None, one))
    else:
        launches = (_linear_launch(name, shape["N"], shape["K"], m, arch),)
    weights, memory_bytes = baseline_load(name, shape, m, part)
    sizes = {key: value for key, value in launches[0].constants.items() if key.startswith("BLOCK_")}
    return KernelCase(
        kernel=name,
        phase="decode" if m <= 8 else "prefill",
        arch=arch,
        shape={"M": m, **shape},
        config={**sizes, "num_warps": launches[0].num_warps, "num_stages": launches[0].num_stages},
        launches=launches,
        weights=weights,
        memory_bytes=memory_bytes,
    )


def baseline_load(name: str, shape: Mapping[str, int], m: int, part: str | None = None) -> tuple[int, int]:
    """Weights that a call reads, and their bytes with the scales; arguments as for :func:`baseline_case`."""
    weights = shape["N"] * shape["K"]
    if name == "vllm_moe_wna16":
        weights *= min(m * shape["top_k"], shape["E"]) * {"w13": 2, "w2": 1, None: 3}[part]
    return weights, int(weights * _BITS_PER_WEIGHT / 8)


def _moe_launch(shape: Mapping[str, int], m: int, arch: str, part: str) -> Launch:
    platform = Platform(arch)
    options = moe_options(shape, m, platform)
    block_m, pairs = options["BLOCK_SIZE_M"], m * shape["top_k"]
    active = min(pairs, shape["E"])
    blocks = empty_blocks(shape, m, block_m, _META)
    owners = [e for e in range(active) for _ in range(-(-(pairs // active + (e < pairs % active)) // block_m))]
    unused = blocks.experts.numel() - len(owners)
    loads: dict[str, int | tuple[int, ...]] = {
        "expert_ids_ptr": (*owners, *[0] * unused),
        "num_tokens_post_padded_ptr": len(owners) * block_m,
        "sorted_token_ids_ptr": 0,
    }
    recorder = Recorder(f"vllm_moe_{part}", moe_kernel(), loads)
    inputs, rows, columns = part_shapes(shape, m, part)
    tensors = {
        "input": _meta(inputs, columns),
        "weight": _meta(shape["E"], rows, columns // 2, dtype=torch.uint8),
        "scale": _meta(shape["E"], rows, columns // GROUP_SIZE),
        "output": _meta(m, shape["top_k"], rows),
        "topk_weights": _meta(m, shape["top_k"], dtype=torch.float32),
    }
    launch_part(moe_launcher(platform, recorder), part, tensors, blocks, shape["top_k"], options)
    return recorder.launches[0]


def _linear_launch(name: str, n: int, k: int, m: int, arch: str) -> Launch:
    _, kernel = linear_launcher(name, Platform(arch))
    recorder = Recorder(name, kernel)
    launcher, _ = linear_launcher(name, Platform(arch), recorder)
    weight, scale = linear_shapes(name, n, k)
    launcher(_meta(m, k), _meta(*weight, dtype=torch.int32), _meta(*scale), *no_zeros(name), GROUP_SIZE)
    return recorder.launches[0]


def _meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device=_META)
