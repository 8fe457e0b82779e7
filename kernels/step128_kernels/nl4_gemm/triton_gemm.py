"""NL4 linear layer on a GPU: picks the config, makes the output, launches the kernel."""

from __future__ import annotations

from functools import lru_cache

import torch

from step128_kernels.launch import Launch
from step128_kernels.nl4_arguments import ELEMENTS, check_columns, codebook_table
from step128_kernels.nl4_gemm.configs import gemm_table
from step128_kernels.nl4_gemm.launches import gemm_launch
from step128_kernels.run_launch import run, uses_assembly


@lru_cache(maxsize=4096)
def _launch(m: int, n: int, k: int, device: torch.device, element: str, amd: bool) -> Launch:
    return gemm_launch(m, n, k, gemm_table(n, k, device).nearest(m), element, amd)


def nl4_gemm_triton(x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
    """Multiply activations by an NL4 weight in kernel layout.

    Args:
        x: bfloat16, float16 or float32 ``[..., K]``, K a multiple of 16. A last dimension that is not contiguous is
            copied.
        tiles: int64 ``[N / 16, K / 32, 16, 2]`` (:mod:`step128_kernels.nl4_layout`).
        scales: int32 ``[N / 16, K / 32, 16]``.
        rows: N before padding.

    Returns:
        ``[..., N]`` in the dtype of ``x``; sums are formed in float32.

    Raises:
        ValueError: the weight's columns are not those of ``x``.
    """
    check_columns(tiles, x.shape[-1])
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        launch = _launch(flat.shape[0], rows, flat.shape[1], x.device, ELEMENTS[x.dtype], uses_assembly(x))
        tensors = {"x_ptr": flat, "tiles_ptr": tiles, "scales_ptr": scales, "y_ptr": y}
        run(launch, tensors | {"codebook_ptr": codebook_table(x.device)})
    return y.view(*x.shape[:-1], rows)
