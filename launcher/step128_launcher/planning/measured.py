"""Which earlier measurement speaks for a set of settings: one made with the same ones, of the same model."""

from collections.abc import Callable, Sequence

from step128_launcher.planning.calibration import Measurement
from step128_launcher.planning.items import Load


def finder(measurements: Sequence[Measurement]) -> Callable[[Load], Measurement | None]:
    """Return the function that finds a Load's measurement; `measurements` are of one machine and model, oldest first.

    The KV cache's dtype is not compared: what is measured is everything but the KV cache.
    """
    if not measurements:
        return lambda load: None
    latest = {_key_of(measurement): measurement for measurement in measurements}

    def find(load: Load) -> Measurement | None:
        return latest.get(
            (
                load.tensor_parallel_size,
                load.num_speculative_tokens,
                load.max_num_seqs,
                load.max_num_batched_tokens,
                load.vision,
                load.attention_backend,
                load.enforce_eager,
                load.dtype,
                load.enable_expert_parallel,
            )
        )

    return find


def _key_of(measurement: Measurement) -> tuple[object, ...]:
    settings = measurement.settings
    return (
        settings.tensor_parallel_size,
        settings.num_speculative_tokens,
        settings.max_num_seqs,
        settings.max_num_batched_tokens,
        settings.vision,
        settings.attention_backend,
        settings.enforce_eager,
        settings.dtype,
        settings.enable_expert_parallel,
    )
