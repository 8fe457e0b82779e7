"""How vLLM launches its 4-bit kernels: its own code, pointed at the platform asked about and at the kernel wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from step128_kernels.vllm_plugin.baselines_source import Platform, answers, as_triton, relinked

GROUP_SIZE = 32
"""Weights a scale; the smallest that vLLM's kernels all take."""
LINEAR_KERNELS = ("vllm_w4a16", "vllm_w4a16_rdna")


@dataclass(frozen=True)
class ExpertBlocks:
    """What vLLM's alignment gives: tensors of it, or with no memory for a launch that is only written down."""

    sorted_pairs: torch.Tensor
    """int32, pair numbers in blocks of one expert, the number of pairs where a block is not full."""
    experts: torch.Tensor
    """int32 ``[blocks]``."""
    padded: torch.Tensor
    """int32 ``[1]``, rows of all blocks that are used."""


def find_kernels() -> None:
    """Import everything that is taken from vLLM.

    Raises:
        ImportError, AttributeError: this vLLM keeps its kernels elsewhere.
    """
    moe_launcher(Platform(""), moe_kernel())
    for name in LINEAR_KERNELS:
        linear_launcher(name, Platform(""))


def moe_options(shape: Mapping[str, int], m: int, platform: Platform) -> dict[str, int]:
    """vLLM's default block sizes for its int4 experts; those along N and K are added when it launches."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    prefers = relinked(fused_moe.should_moe_wna16_use_cuda, platform)
    choose = relinked(fused_moe.get_default_config, platform, should_moe_wna16_use_cuda=prefers)
    sizes = shape["E"], shape["N"], shape["K"], shape["top_k"]
    return dict(choose(m, *sizes, "int4_w4a16", [0, GROUP_SIZE]))


def moe_launcher(platform: Platform, kernel: Any) -> Callable[..., None]:
    """vLLM's function that launches its expert kernel, launching ``kernel``."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    return relinked(  # type: ignore[no-any-return]
        fused_moe.invoke_fused_moe_wna16_triton_kernel, platform, fused_moe_kernel_gptq_awq=kernel
    )


def moe_kernel() -> Any:
    """``fused_moe_kernel_gptq_awq`` for Triton."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    return as_triton(fused_moe.fused_moe_kernel_gptq_awq)


def empty_blocks(shape: Mapping[str, int], m: int, block_m: int, device: torch.device) -> ExpertBlocks:
    """The tensors that vLLM's alignment fills, in the sizes it gives them, not filled."""
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as align

    allocate = relinked(align.moe_align_block_size, Platform(""), ops=_NoOps())
    return ExpertBlocks(
        *allocate(torch.empty(m, shape["top_k"], dtype=torch.int32, device=device), block_m, shape["E"])
    )


class _NoOps:
    """Stands for vLLM's compiled operators where only the code around them is wanted."""

    def moe_align_block_size(self, *arguments: Any) -> None:
        """Fill nothing."""


def launch_part(
    launcher: Callable[..., None],
    part: str,
    tensors: Mapping[str, torch.Tensor],
    blocks: ExpertBlocks,
    top_k: int,
    options: Mapping[str, int],
) -> None:
    """Call vLLM's launcher for one of the two products as its ``fused_experts`` does.

    Args:
        launcher: from :func:`moe_launcher`.
        part: "w13" or "w2".
        tensors: "input" bfloat16 or float16 ``[tokens, hidden]`` (w2: ``[pairs, intermediate]``), "weight" uint8
            ``[experts, rows, columns / 2]``, "scale" ``[experts, rows, columns / 32]``, "output"
            ``[tokens, top_k, rows]``, both of the input's type, "topk_weights" float32 ``[tokens, top_k]``.
        blocks: which pairs go to which expert.
        top_k: experts per token.
        options: from :func:`moe_options`.
    """
    launcher(
        tensors["input"],
        tensors["weight"],
        tensors["output"],
        tensors["scale"],
        None,
        tensors["topk_weights"],
        blocks.sorted_pairs,
        blocks.experts,
        blocks.padded,
        part == "w2",
        top_k if part == "w13" else 1,
        dict(options),
        compute_type=tl.bfloat16 if tensors["input"].dtype == torch.bfloat16 else tl.float16,
        use_int8_w8a16=False,
        use_int4_w4a16=True,
        block_shape=[0, GROUP_SIZE],
    )


def part_shapes(shape: Mapping[str, int], m: int, part: str) -> tuple[int, int, int]:
    """Rows of the input, rows and columns of one expert's weight."""
    if part == "w13":
        return m, 2 * shape["N"], shape["K"]
    return m * shape["top_k"], shape["K"], shape["N"]


def linear_launcher(name: str, platform: Platform, kernel: Any = None) -> tuple[Callable[..., torch.Tensor], Any]:
    """vLLM's function that multiplies with ``vllm_w4a16`` or ``vllm_w4a16_rdna``, and its Triton kernel.

    Args:
        name: which.
        platform: whose block sizes.
        kernel: launched in the kernel's place.
    """
    from vllm.model_executor.kernels.linear.mixed_precision import rdna_hybrid_w4a16, triton_w4a16

    if name == "vllm_w4a16":
        own = as_triton(triton_w4a16.triton_w4a16_gemm_kernel)
        function, place = triton_w4a16._triton_w4a16_gemm_impl, "triton_w4a16_gemm_kernel"
    else:
        own = as_triton(rdna_hybrid_w4a16._triton_w4a16_skinny_fmt_kernel)
        function, place = rdna_hybrid_w4a16.triton_w4a16_skinny_fmt_gemm, "_triton_w4a16_skinny_fmt_kernel"
    replaced = {place: own if kernel is None else kernel} | answers("_on_", platform.arch)
    return relinked(function, platform, **replaced), own


def linear_shapes(name: str, n: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the int32 weight and of its scales."""
    if name == "vllm_w4a16":
        return (k, n // 8), (k // GROUP_SIZE, n)
    return (n, k // 8), (n, k // GROUP_SIZE)


def linear_call(name: str, platform: Platform) -> Callable[..., torch.Tensor]:
    """vLLM's whole linear layer: a function of activations, weight and scales.

    Of ``vllm_w4a16_rdna`` it is vLLM's choice between its HIP and its Triton kernel, with the copy of the activations
    that it makes on gfx1151.
    """
    from vllm.model_executor.kernels.linear.mixed_precision import rdna_hybrid_w4a16

    launcher, _ = linear_launcher(name, platform)
    if name == "vllm_w4a16":
        return lambda x, weight, scale: launcher(x, weight, scale, None, GROUP_SIZE)
    arch = answers("_on_", platform.arch)
    pad = relinked(rdna_hybrid_w4a16._pad_activation_rows, platform, **arch)
    own = {"triton_w4a16_skinny_fmt_gemm": launcher, "_pad_activation_rows": pad}
    apply = relinked(rdna_hybrid_w4a16._rdna_hybrid_w4a16_apply_impl, platform, **own)

    def call(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        return apply(x, weight.view(torch.int8), scale, None, None, units, GROUP_SIZE)  # type: ignore[no-any-return]

    return call


def padded_words(name: str, words: int, platform: Platform) -> int:
    """Words from row to row of a weight: vLLM moves rows apart on gfx1151, where some strides collide in the caches."""
    from vllm.model_executor.kernels.linear.mixed_precision import rdna_hybrid_w4a16

    if name != "vllm_w4a16_rdna" or platform.arch != "gfx1151":
        return words
    return words + int(rdna_hybrid_w4a16._weight_pad_bytes(4 * words)) // 4


def has_hip_kernel() -> bool:
    """Whether the HIP kernel that vLLM runs for few rows on RDNA is here: only in a vLLM built for ROCm."""
    import vllm._custom_ops  # noqa: F401  # loads it

    return torch.version.hip is not None and hasattr(torch.ops._rocm_C, "wvSplitK_int4_g")


def no_zeros(name: str) -> tuple[None, ...]:
    """The argument for zero points, which only one of the two takes in front of the group size."""
    return (None,) if name == "vllm_w4a16" else ()
