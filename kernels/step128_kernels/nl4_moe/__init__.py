"""NL4 routed experts. ``nl4_moe`` is what callers use; it picks the implementation by device.

Only the torch reference exists so far, on every device. The Triton kernels for gfx1201 and gfx1151 take their place
here, behind the same signature.
"""

from step128_kernels.nl4_moe.reference import nl4_moe_reference as nl4_moe

__all__ = ["nl4_moe"]
