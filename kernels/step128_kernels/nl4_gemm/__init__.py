"""NL4 linear layer. ``nl4_gemm`` is what callers use; it picks the implementation by device.

Only the torch reference exists so far, on every device. The Triton kernels for gfx1201 and gfx1151 take their place
here, behind the same signature.
"""

from step128_kernels.nl4_gemm.reference import nl4_gemm_reference as nl4_gemm

WEIGHT_PATH = "torch"
"""What computes with NL4 weights: ``torch`` (the reference) or ``triton``; in every load report."""

__all__ = ["WEIGHT_PATH", "nl4_gemm"]
