from __future__ import annotations

import numpy as np
import pytest

from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.pruning.super_experts import find_super_experts, threshold

MOE_LAYERS, EXPERTS = range(3, 45), 288

# The model card of the published 240-expert checkpoint lists eight super-experts, in layers 29 and 41 to 44. Only the
# layers are the card's: its expert numbers and activations could not be had, those here are made up.
CARD = {
    (29, 113): 512.0,
    (41, 7): 480.0,
    (41, 260): 1120.0,
    (42, 30): 705.0,
    (42, 181): 3300.0,
    (43, 94): 890.0,
    (44, 0): 2048.0,
    (44, 287): 601.0,
}


def activations(outliers: dict[tuple[int, int], float]) -> dict[int, np.ndarray]:
    """Ordinary activations of every MoE layer (log-normal, growing with depth), and the outliers among them."""
    random = np.random.default_rng(128)
    rows = {layer: random.lognormal(2 + 0.03 * layer, 0.5, EXPERTS).astype(np.float32) for layer in MOE_LAYERS}
    for (layer, expert), value in outliers.items():
        rows[layer][expert] = value
    return rows


def test_the_cards_eight_and_no_others() -> None:
    rows = activations(CARD)
    ordinary = [value for layer, row in rows.items() for e, value in enumerate(row) if (layer, e) not in CARD]
    assert 100 < max(ordinary) < threshold(rows) == pytest.approx(330)
    assert find_super_experts(rows) == set(CARD)


def test_order_of_the_layers_does_not_matter() -> None:
    rows = activations(CARD)
    assert find_super_experts(dict(reversed(rows.items()))) == set(CARD)


def test_first_three_quarters_hold_only_one_of_the_eight() -> None:
    assert find_super_experts(activations(CARD), fraction_of_layers=0.75) == {(29, 113)}
    assert find_super_experts(activations(CARD), fraction_of_layers=0) == frozenset()
    at_the_end = {(33, 5): 3000.0, (34, 5): 3000.0}  # 31 of 42 layers are 3 to 33
    assert find_super_experts(activations(at_the_end), fraction_of_layers=0.75) == {(33, 5)}


def test_a_tenth_of_the_largest_is_not_yet_super() -> None:
    rows = {3: np.asarray([1000.0, 100.0, 100.5] + [1.0] * 997), 5: np.ones(1000)}
    assert threshold(rows) == 100
    assert find_super_experts(rows) == {(3, 0), (3, 2)}


def test_without_outliers_the_percentile_decides() -> None:
    values = np.random.default_rng(0).permutation(np.arange(12096, dtype=np.float64) + 12096).reshape(42, EXPERTS)
    found = find_super_experts(dict(zip(MOE_LAYERS, values, strict=True)))
    assert len(found) == 61
    assert min(values[layer - 3, expert] for layer, expert in found) == values.max() - 60


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_what_is_no_magnitude_is_refused(bad: float) -> None:
    with pytest.raises(CheckpointError, match="expert 8 in layer 43"):
        find_super_experts(activations({(43, 8): bad}))


def test_model_without_experts() -> None:
    with pytest.raises(CheckpointError, match="no MoE layers"):
        find_super_experts({})
