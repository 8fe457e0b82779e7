from __future__ import annotations

import numpy as np
import pytest

from step128_checkpoint.calibration.result import LayerSaliency
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.pruning.criteria import CRITERIA, keep_experts, scores, unseen


def saliency(gated: list[float], tokens: list[int], norms: list[float] | None = None) -> LayerSaliency:
    return LayerSaliency(
        np.asarray(tokens),
        np.asarray(gated, dtype=np.float64),
        np.asarray(norms or gated, dtype=np.float64),
        np.ones(len(tokens), dtype=np.float32),
    )


def routed_toy() -> LayerSaliency:
    """Three tokens through three experts of which each takes two, with a softmax router.

    Router logits ln(4,2,1), ln(1,1,2), ln(1,3,6), so that the two chosen weights are 2/3 and 1/3 after renormalising.
    """
    routing = [((0, 2 / 3), (1, 1 / 3)), ((2, 2 / 3), (0, 1 / 3)), ((2, 2 / 3), (1, 1 / 3))]
    outputs = [{0: (3, 4), 1: (0, 6)}, {2: (5, 12), 0: (0, -9)}, {2: (8, 15), 1: (0, 0)}]
    tokens, gated, norms, largest = np.zeros(3, dtype=np.int64), np.zeros(3), np.zeros(3), np.zeros(3, np.float32)
    for chosen, output in zip(routing, outputs, strict=True):
        for expert, gate in chosen:
            norm = float(np.linalg.norm(output[expert]))
            tokens[expert] += 1
            gated[expert] += gate * norm
            norms[expert] += norm
            largest[expert] = max(largest[expert], *np.abs(output[expert]))
    return LayerSaliency(tokens, gated, norms, largest)


def test_toy_case_gives_what_reaps_own_code_gives() -> None:
    # By hand, and as the public tool computes them on these logits and outputs (update_pruning_state with
    # renormalize_router_weights, reap@1970473): reap 3.1667, 1, 10; ean_sum 14, 6, 30; expert_frequency 2, 2, 2.
    toy = routed_toy()
    np.testing.assert_allclose(scores(toy, "reap", 0, 3), [19 / 6, 1, 10], rtol=1e-15)
    np.testing.assert_array_equal(scores(toy, "ean", 0, 3), [14, 6, 30])
    np.testing.assert_array_equal(scores(toy, "frequency", 0, 3), [2, 2, 2])
    # Its max_activations are 4, 6, 15: it takes the largest signed value, and misses the -9 of expert 0.
    np.testing.assert_array_equal(toy.max_activation, [9, 6, 15])


def test_criteria_differ_where_they_should() -> None:
    rare = saliency(gated=[9.0, 10.0, 8.0], tokens=[1, 100, 50], norms=[90.0, 20.0, 300.0])
    assert keep_experts(rare, 1, "reap", (), 0, 3) == (0,)
    assert keep_experts(rare, 1, "frequency", (), 0, 3) == (1,)
    assert keep_experts(rare, 1, "ean", (), 0, 3) == (2,)


def test_expert_without_tokens_scores_zero() -> None:
    np.testing.assert_array_equal(scores(saliency([0, 6, 0], [0, 2, 0]), "reap", 0, 3), [0, 3, 0])


def test_ties_keep_the_lower_number() -> None:
    tied = saliency([2.0, 2.0, 4.0, 2.0, 1.0], [1] * 5)
    assert [keep_experts(tied, keep, "reap", (), 0, 3) for keep in (1, 2, 3, 5)] == [
        (2,),
        (0, 2),
        (0, 1, 2),
        (0, 1, 2, 3, 4),
    ]


def test_protected_experts_stay_whatever_their_score() -> None:
    low = saliency([5.0, 4.0, 3.0, 0.0], [1] * 4)
    assert keep_experts(low, 2, "reap", {3}, 0, 3) == (0, 3)
    assert keep_experts(low, 2, "reap", {2, 3}, 0, 3) == (2, 3)
    with pytest.raises(ConfigurationError, match="layer 3: 3 experts are protected, more than the 2"):
        keep_experts(low, 2, "reap", {1, 2, 3}, 0, 3)
    with pytest.raises(ConfigurationError, match="layer 3 has no expert 4"):
        keep_experts(low, 2, "reap", {4}, 0, 3)


def test_random_depends_on_seed_and_layer_only() -> None:
    chosen = {
        (seed, layer): keep_experts(unseen(288), 240, "random", (), seed, layer) for seed in (0, 1) for layer in (3, 4)
    }
    assert len(set(chosen.values())) == 4
    assert chosen[0, 3] == keep_experts(saliency([1.0] * 288, [1] * 288), 240, "random", (), 0, 3)
    dropped = [set(range(288)) - set(keep_experts(unseen(288), 240, "random", (), seed, 3)) for seed in range(200)]
    times = np.bincount([expert for experts in dropped for expert in experts], minlength=288)
    assert times.min() > 0  # 200 draws of 48 of 288: 33 expected for each, and none with probability 288 * e^-36
    assert times.max() < 80


@pytest.mark.parametrize("keep", [0, 7, 289])
def test_keep_out_of_range(keep: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{keep} experts cannot be kept of 288; each token needs 8"):
        keep_experts(unseen(288), keep, "frequency", (), 0, 3, experts_per_token=8)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name in ("reap", "ean")])
def test_sums_that_are_not_finite_are_refused(criterion: str) -> None:
    with pytest.raises(CheckpointError, match=f"expert 1 of layer 3 the {criterion} score nan"):
        keep_experts(saliency([1.0, np.nan, 1.0], [1, 1, 1]), 2, criterion, (), 0, 3)
