"""Where the speed model's inputs come from: the profile's assumptions and the model card, or the command line."""

from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.speculation import SpeedInputs

# The model card's figures for Step-3.7-Flash-240REAP, positions 1 to 3.
CARD_ACCEPTANCE = (0.92, 0.75, 0.55)

# A model that could be read whole in this time is not bound by memory traffic but by what the speed model leaves out.
_TOO_SMALL_SECONDS = 1e-3


def speed_inputs(footprint: ModelFootprint, profile: Profile, limits: Limits) -> SpeedInputs | None:
    """Return the inputs, or None if the profile knows no bandwidth (a CPU) or the model is too small for them."""
    bandwidth, efficiency = profile.memory_bandwidth, profile.bandwidth_efficiency
    reduce_time = profile.all_reduce_microseconds
    if bandwidth is None or efficiency is None or reduce_time is None:
        return None
    if footprint.stored_bytes < bandwidth.value * 1e9 * _TOO_SMALL_SECONDS:
        return None
    asked = limits.acceptance
    where = "--acceptance" if asked else "the model card's figures, not measured here"
    return SpeedInputs(
        memory_bandwidth=bandwidth.value * 1e9,
        bandwidth_efficiency=efficiency.value,
        all_reduce_seconds=reduce_time.value * 1e-6,
        acceptance=asked or CARD_ACCEPTANCE,
        conditional=not limits.acceptance_unconditional,
        sources=(
            ("memory_bandwidth", bandwidth.source),
            ("bandwidth_efficiency", efficiency.source),
            ("all_reduce_seconds", reduce_time.source),
            ("acceptance", where),
        ),
    )


def speed_sources(inputs: SpeedInputs | None) -> tuple[tuple[str, str], ...]:
    """Return input -> its value and source, for people."""
    if inputs is None:
        return ()
    kind = "conditional on the position before" if inputs.conditional else "unconditional"
    values = {
        "memory_bandwidth": f"{inputs.memory_bandwidth / 1e9:.0f} GB/s a rank",
        "bandwidth_efficiency": f"{inputs.bandwidth_efficiency:.2f}",
        "all_reduce_seconds": f"{1e6 * inputs.all_reduce_seconds:.0f} microseconds",
        "acceptance": f"{' / '.join(f'{value:g}' for value in inputs.acceptance)}, {kind}",
    }
    return tuple((name, f"{values[name]} ({source})") for name, source in inputs.sources)
