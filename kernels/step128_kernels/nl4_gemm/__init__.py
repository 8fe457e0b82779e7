"""NL4 linear layer. ``nl4_gemm`` is what callers use; it picks the implementation by device.

Only the torch reference exists so far, on every device. The Triton kernels for gfx1201 and gfx1151 take their place
here, behind the same signature.
"""

from step128_kernels.nl4_gemm.reference import nl4_gemm_reference as nl4_gemm

__all__ = ["nl4_gemm"]
