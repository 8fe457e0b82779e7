"""Which earlier measurement speaks for a set of settings: one made with the same ones, of the same model."""

from collections.abc import Callable, Sequence
from operator import attrgetter

from step128_launcher.planning.calibration import Measurement
from step128_launcher.planning.items import Load

# Of a Load, and of a measurement's Settings, which name them alike. The KV cache's dtype is not among them: what is
# measured is everything but the KV cache.
_KEY = attrgetter(
    "tensor_parallel_size",
    "num_speculative_tokens",
    "max_num_seqs",
    "max_num_batched_tokens",
    "vision",
    "attention_backend",
    "enforce_eager",
    "dtype",
    "enable_expert_parallel",
)


def finder(measurements: Sequence[Measurement]) -> Callable[[Load], Measurement | None]:
    """Return what finds a Load's measurement; `measurements` are of one machine and model, oldest first."""
    if not measurements:
        return lambda load: None
    latest = {_KEY(measurement.settings): measurement for measurement in measurements}
    return lambda load: latest.get(_KEY(load))
