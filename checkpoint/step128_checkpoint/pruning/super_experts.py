"""Super-experts: the few experts whose outputs are so large that losing one breaks the model.

The rule is that of REAP's released code, on |activation| (its code takes the largest signed value, which misses
negative outliers) and by true layer numbers (its code counts MoE layers from 0 and then reads the count as a layer
number, so on a model whose first layers are dense it protects the wrong layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.errors import CheckpointError

PERCENTILE = 99.5
SHARE_OF_MAXIMUM = 0.1


def find_super_experts(
    max_activation: Mapping[int, NDArray[np.floating[Any]]], fraction_of_layers: float = 1.0
) -> frozenset[tuple[int, int]]:
    """Name the experts whose largest |activation| lies above :func:`threshold`.

    Args:
        max_activation: true layer number -> [E], largest |f(x)| of any channel over the calibration tokens; every MoE
            layer of the model, since the threshold is one for all of them.
        fraction_of_layers: only experts in this first share of the MoE layers are named. 1.0 is REAP's outlier mode and
            our default: Step-3.7-Flash's published super-experts lie in layers 29 and 41 to 44 of 3 to 44, and the 0.75
            of REAP's other mode ends at layer 33.

    Returns:
        Pairs of true layer number and original expert number. In a model of few experts the percentile alone names
        the largest one; with 12096 experts at most 61.

    Raises:
        CheckpointError: a value is negative or not finite.
    """
    layers = sorted(max_activation)
    limit = threshold(max_activation)
    return frozenset(
        (layer, int(expert))
        for layer in layers[: int(len(layers) * fraction_of_layers)]
        for expert in np.flatnonzero(np.asarray(max_activation[layer], dtype=np.float64) > limit)
    )


def threshold(max_activation: Mapping[int, NDArray[np.floating[Any]]]) -> float:
    """The larger of the 99.5th percentile of all experts' values (interpolated) and a tenth of the largest.

    Raises:
        CheckpointError: there are no values, or one is negative or not finite.
    """
    for layer, row in max_activation.items():
        for expert in np.flatnonzero(~(np.isfinite(row) & (row >= 0))):
            raise CheckpointError(
                f"the calibration's largest activation of expert {expert} in layer {layer} is {row[expert]}; a finite "
                "magnitude is needed. Calibrate again, in float32 if it was float16."
            )
    if not max_activation:
        raise CheckpointError("the calibration holds no activations: the model has no MoE layers")
    values = np.concatenate([np.asarray(row, dtype=np.float64) for row in max_activation.values()])
    return float(max(np.percentile(values, PERCENTILE), SHARE_OF_MAXIMUM * values.max()))
