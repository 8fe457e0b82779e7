"""Asking "what if" by sums gives what reading config.json anew gives."""

from pathlib import Path

import pytest

from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.model.checkpoint import assume_footprint
from step128_launcher.model.footprint import requantized
from step128_launcher.model.quantization import read_format
from step128_launcher.model.weights import rank_weights

REAL_MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"
FORM = read_format(find_configs_dir())


@pytest.mark.parametrize("before", [None, *FORM.policies])
@pytest.mark.parametrize("policy", FORM.policies)
def test_sizes_equal_those_of_a_checkpoint_with_that_policy(before: str | None, policy: str) -> None:
    asked = requantized(assume_footprint(REAL_MODEL, FORM, before), FORM, policy)
    real = assume_footprint(REAL_MODEL, FORM, policy)
    for ranks in (1, 4):
        sizes = [
            {
                (part.component, part.draft): part.rank_bytes
                for part in rank_weights(
                    footprint, dtype="bfloat16", tensor_parallel_size=ranks, drafting=True, vision=True
                )
                if part.component != "kv_scales"
            }
            for footprint in (asked, real)
        ]
        assert sizes[0] == sizes[1]
    assert asked.quantization == real.quantization
    assert asked.kv_scales == real.kv_scales
