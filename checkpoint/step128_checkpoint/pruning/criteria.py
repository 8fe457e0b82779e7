"""How experts are ranked, and which of a layer stay.

Adding a criterion: one entry in ``_SCORES``, from sums of :class:`LayerSaliency` to one number for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.calibration.result import LayerSaliency
from step128_checkpoint.errors import CheckpointError, ConfigurationError

Criterion = Literal["reap", "ean", "frequency", "random"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


def _reap(saliency: LayerSaliency) -> NDArray[np.float64]:
    """Mean of g(x)·‖f(x)‖₂ over the tokens routed to the expert (arXiv:2510.13999; g renormalised)."""
    return np.divide(
        saliency.gated_norm_sum,
        saliency.tokens,
        out=np.zeros(saliency.tokens.shape, dtype=np.float64),
        where=saliency.tokens > 0,
    )


_SCORES: dict[Criterion, Callable[[LayerSaliency], NDArray[np.float64]]] = {
    "reap": _reap,
    # Expert activation norm as the REAP paper compares against it: the sum over the routed tokens, not the mean.
    "ean": lambda saliency: saliency.norm_sum,
    "frequency": lambda saliency: saliency.tokens.astype(np.float64),
}


def scores(saliency: LayerSaliency, criterion: Criterion, seed: int, layer: int) -> NDArray[np.float64]:
    """Score the experts of one layer; the lowest are pruned.

    Args:
        saliency: of the layer; ``random`` uses only the number of experts.
        criterion: ``reap`` (an expert that saw no token scores 0), ``ean`` (sum of ‖f(x)‖₂), ``frequency`` (tokens
            routed to the expert) or ``random``.
        seed: not negative; decides ``random``, together with the layer.
        layer: true number of the layer.

    Returns:
        float64 [E] by original expert number.

    Raises:
        CheckpointError: the sums are not finite.
    """
    if criterion == "random":
        return np.random.default_rng([seed, layer]).random(len(saliency.tokens))
    result = _SCORES[criterion](saliency)
    if not np.isfinite(result).all():
        worst = int(np.flatnonzero(~np.isfinite(result))[0])
        raise CheckpointError(
            f"the calibration gives expert {worst} of layer {layer} the {criterion} score {result[worst]}; "
            "a finite number is needed. Calibrate again, in float32 if it was float16."
        )
    return result


def keep_experts(
    saliency: LayerSaliency,
    keep: int,
    criterion: Criterion,
    protected: Collection[int],
    seed: int,
    layer: int,
    *,
    experts_per_token: int = 1,
) -> tuple[int, ...]:
    """Choose the experts of one layer that stay: the protected ones, then the highest scores.

    Of equal scores the lower expert number stays, so that the same calibration always gives the same choice.

    Returns:
        ``keep`` original expert numbers, ascending.

    Raises:
        ConfigurationError: ``keep`` is below ``experts_per_token`` or above the number of experts, ``protected`` names
            an expert that the layer does not have, or more than ``keep`` of them.
        CheckpointError: the sums are not finite.
    """
    experts = len(saliency.tokens)
    if not experts_per_token <= keep <= experts:
        raise ConfigurationError(
            f"layer {layer}: {keep} experts cannot be kept of {experts}; each token needs {experts_per_token}"
        )
    guarded = set(protected)
    if unknown := sorted(guarded - set(range(experts))):
        raise ConfigurationError(f"layer {layer} has no expert {unknown[0]}; it has 0 to {experts - 1}")
    if len(guarded) > keep:
        raise ConfigurationError(f"layer {layer}: {len(guarded)} experts are protected, more than the {keep} to keep")
    values = scores(saliency, criterion, seed, layer)
    ranked = sorted(range(experts), key=lambda expert: (expert not in guarded, -values[expert], expert))
    return tuple(sorted(ranked[:keep]))


def unseen(experts: int) -> LayerSaliency:
    """The sums of a layer that no token was run through; enough for the criterion ``random``."""
    nothing = np.zeros(experts)
    return LayerSaliency(nothing.astype(np.int64), nothing, nothing, nothing.astype(np.float32))
