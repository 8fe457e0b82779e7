"""Why a firmware holds the clocks down, by the names of the kernel.

Sources: drivers/gpu/drm/amd/pm/swsmu/inc/amdgpu_smu.h (SMU_THROTTLER_*_BIT, the same for every card), of which
smu_v14_0_2_ppt.c maps those below for the R9700; the order of throttle_residency_* in kgd_pp_interface.h.
"""

from dataclasses import dataclass

POWER, CURRENT, TEMPERATURE, PROCHOT, OTHER = "power", "current", "temperature", "prochot", "other"


@dataclass(frozen=True)
class Throttler:
    """One reason: its bit in indep_throttle_status, or its place among the residencies; `cause` is what to look at."""

    bit: int
    reason: str
    cause: str


THROTTLERS = (
    Throttler(0, "ppt0", POWER),
    Throttler(1, "ppt1", POWER),
    Throttler(2, "ppt2", POWER),
    Throttler(3, "ppt3", POWER),
    Throttler(16, "tdc_gfx", CURRENT),
    Throttler(17, "tdc_soc", CURRENT),
    Throttler(18, "tdc_mem", CURRENT),
    Throttler(22, "edc_gfx", CURRENT),
    Throttler(32, "temp_gpu", TEMPERATURE),
    Throttler(34, "temp_mem", TEMPERATURE),
    Throttler(35, "temp_edge", TEMPERATURE),
    Throttler(36, "temp_hotspot", TEMPERATURE),
    Throttler(37, "temp_soc", TEMPERATURE),
    Throttler(38, "temp_vr_gfx", TEMPERATURE),
    Throttler(39, "temp_vr_soc", TEMPERATURE),
    Throttler(40, "temp_vr_mem0", TEMPERATURE),
    Throttler(41, "temp_vr_mem1", TEMPERATURE),
    Throttler(42, "temp_liquid0", TEMPERATURE),
    Throttler(43, "temp_liquid1", TEMPERATURE),
    Throttler(44, "vrhot0", TEMPERATURE),
    Throttler(45, "vrhot1", TEMPERATURE),
    Throttler(46, "prochot_cpu", PROCHOT),
    Throttler(47, "prochot_gfx", PROCHOT),
    # How well the silicon came out (FIT) and droops of the supply (APCC) limit clocks in normal work too.
    Throttler(23, "apcc", OTHER),
    Throttler(57, "fit", OTHER),
)
RESIDENCIES = (
    Throttler(0, "prochot", PROCHOT),
    Throttler(1, "spl", POWER),
    Throttler(2, "fppt", POWER),
    Throttler(3, "sppt", POWER),
    Throttler(4, "thm_core", TEMPERATURE),
    Throttler(5, "thm_gfx", TEMPERATURE),
    Throttler(6, "thm_soc", TEMPERATURE),
)
