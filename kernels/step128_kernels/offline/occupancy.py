"""How many waves of a kernel a SIMD holds at once.

Sources: AMD's GPU hardware specifications (768 KiB of vector registers and 128 KiB of LDS per work-group processor,
which is two compute units or four SIMDs) and LLVM's AMDGPU backend (1536 registers of 32 lanes per SIMD, allocated by
24, at most 16 waves; both gfx1201 and gfx1151). Work-groups are placed whole.
"""

from __future__ import annotations

import math

VGPRS_PER_SIMD = 1536
VGPR_GRANULE = 24
MOST_WAVES_PER_SIMD = 16
LDS_BYTES_PER_WGP = 128 * 1024
MOST_LDS_BYTES_PER_WORKGROUP = 64 * 1024
SIMDS_PER_WGP = 4


def waves_by_registers(vgprs: int) -> int:
    """Waves per SIMD that vector registers allow: 96 registers 16, 120 12, 192 8, 256 5."""
    allocated = max(1, math.ceil(vgprs / VGPR_GRANULE)) * VGPR_GRANULE
    return min(MOST_WAVES_PER_SIMD, VGPRS_PER_SIMD // allocated)


def waves_per_simd(vgprs: int, lds_bytes: int, num_warps: int) -> float:
    """Waves per SIMD when the GPU is full, averaged over the four of a work-group processor; 0 if it cannot run."""
    if lds_bytes > MOST_LDS_BYTES_PER_WORKGROUP:
        return 0.0
    workgroups = waves_by_registers(vgprs) * SIMDS_PER_WGP // num_warps
    if lds_bytes:
        workgroups = min(workgroups, LDS_BYTES_PER_WGP // lds_bytes)
    return workgroups * num_warps / SIMDS_PER_WGP
