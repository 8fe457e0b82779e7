"""What a sweep refuses, what it says it needs, and its command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sample_sets import LENGTHS, write_samples

from step128_checkpoint.calibration import needs
from step128_checkpoint.calibration.needs import needs_of
from step128_checkpoint.calibration.options import CalibrationOptions
from step128_checkpoint.calibration.plan import make_plan
from step128_checkpoint.calibration.result import open_calibration
from step128_checkpoint.calibration.sweep import calibrate
from step128_checkpoint.cli import main
from step128_checkpoint.errors import CheckpointError, ConfigurationError, OutputError

EXPERTS, KEEP, MOE_LAYERS = 16, 11, range(3, 9)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., CalibrationOptions]:
    """Factory: options for a random model of three layers, with whatever is asked for changed in it."""

    def make(largest_id: int = 95, **changes: Any) -> CalibrationOptions:
        checkpoint = make_checkpoint(moe_top_k=2, sliding_window=8, **changes)
        ids = [np.arange(length) % (largest_id + 1) for length in (120, 20, 120)]
        samples = write_samples(tmp_path / "samples", ids, held_out=[1], vocabulary=largest_id + 1)
        return CalibrationOptions(checkpoint, samples, tmp_path / "cal", device="cpu")

    return make


def test_a_checkpoint_without_mtp_layers(small: Callable[..., CalibrationOptions]) -> None:
    options = small(drop=r"layers\.3\.")
    calibrate(options)
    found = open_calibration(options.out)
    assert set(found.kv_ranges) == {0, 1, 2}
    assert not any(name.startswith("model.layers.3.") for name in load_file(found.importance_path))
    assert "lm_head.weight" in load_file(found.importance_path)


def test_what_gives_nan_is_named(small: Callable[..., CalibrationOptions]) -> None:
    weight = np.zeros((64, 64), dtype=np.float32)
    weight[3, 5] = np.nan
    options = small(replace={"model.layers.2.self_attn.o_proj.weight": weight})
    with pytest.raises(CheckpointError, match=r"layer 2 gave NaN.*verify"):
        calibrate(options)
    assert not options.out.exists()


def test_what_fails_at_once_leaves_nothing(small: Callable[..., CalibrationOptions]) -> None:
    table = np.zeros((96, 64), dtype=np.float32)
    table[0] = np.inf
    options = small(replace={"model.embed_tokens.weight": table})
    with pytest.raises(CheckpointError, match="the embedding of sample 0 gave infinity"):
        calibrate(options)
    assert not options.out.exists() and not options.out.with_name("cal.partial").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 1}, "1 experts cannot be kept: each token needs 2, there are 4"),
        ({"keep": 5}, "5 experts cannot be kept"),
        ({"device": "cuda:9"}, r"device cuda:9 was asked for, torch finds"),
        ({"device": "quantum"}, r"device 'quantum' is not known; auto, cpu"),
        ({"device": "meta"}, r"device 'meta' cannot be used"),
        ({"max_memory_bytes": 1000}, r"memory are needed: .* for the largest layer .*--max-memory allows 1\.00 kB"),
    ],
)
def test_impossible_options_are_refused(
    small: Callable[..., CalibrationOptions], changes: dict[str, Any], message: str
) -> None:
    options = replace(small(), **changes)
    with pytest.raises(ConfigurationError, match=message):
        calibrate(options)
    assert not options.out.with_name("cal.partial").exists()


def test_samples_of_another_tokenizer_are_refused(small: Callable[..., CalibrationOptions]) -> None:
    with pytest.raises(CheckpointError, match="token id 96 is outside this model's vocabulary of 96"):
        calibrate(small(largest_id=96))


def test_samples_of_a_tokenizer_that_only_looks_alike_are_refused(
    small: Callable[..., CalibrationOptions], tmp_path: Path
) -> None:
    options = small()
    own, other = options.checkpoint / "tokenizer.json", tmp_path / "tokenizer.json"
    other.write_text('{"made": "otherwise"}')
    ids = [np.arange(50)]
    write_samples(options.samples, ids, vocabulary=96, tokenizer=other)
    with pytest.raises(CheckpointError, match=r"made with another tokenizer\.json than"):
        calibrate(options)
    write_samples(options.samples, ids, vocabulary=96, tokenizer=own)
    calibrate(options)


def test_samples_must_not_all_be_held_out(small: Callable[..., CalibrationOptions], tmp_path: Path) -> None:
    options = small()
    write_samples(options.samples, [np.arange(9)], held_out=[0], vocabulary=96)
    with pytest.raises(CheckpointError, match="no samples to calibrate with"):
        calibrate(options)


def test_the_output_may_not_lie_in_an_input(small: Callable[..., CalibrationOptions]) -> None:
    options = small()
    for folder in (options.checkpoint, options.samples):
        with pytest.raises(OutputError, match="inside the input folder"):
            calibrate(replace(options, out=folder / "cal"))


def test_disk_is_checked_first(small: Callable[..., CalibrationOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    options = small()
    states = needs_of(make_plan(options)).states
    assert states == 2 * (120 + 20 + 120) * 64 * 2
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(states, states - 1, 1))
    with pytest.raises(OutputError, match=r"66\.56 kB of them for hidden states.*, 1 bytes are free"):
        calibrate(options)
    assert not options.out.with_name("cal.partial").exists()


def test_results_are_as_large_as_was_said(options: CalibrationOptions) -> None:
    asked = replace(options, keep=KEEP, hessians=True)
    said = needs_of(make_plan(asked)).results
    calibrate(asked)
    found = sum(path.stat().st_size for path in asked.out.rglob("*.safetensors"))
    assert said <= found <= 1.02 * said  # the headers are not counted


def test_an_expert_that_only_all_samples_show_to_be_super_is_warned_of(
    options: CalibrationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "step128_checkpoint.calibration.result_writer"
    monkeypatch.setattr(f"{module}.pilot_super_experts", lambda files: frozenset())
    monkeypatch.setattr("step128_checkpoint.calibration.sweep.pilot_super_experts", lambda files: frozenset({(5, 1)}))

    def find(largest: dict[int, np.ndarray]) -> frozenset[tuple[int, int]]:
        assert set(largest) == set(MOE_LAYERS)
        return frozenset({(5, 1), *((4, expert) for expert in range(EXPERTS))})

    monkeypatch.setattr(f"{module}.find_super_experts", find)
    summary = calibrate(replace(options, keep=KEEP))
    pruned = open_calibration(options.out).document["pruned"]
    assert pruned["super_experts"] == [[5, 1]] and 1 in pruned["kept_experts"]["5"]
    dropped = sorted(set(range(EXPERTS)) - set(pruned["kept_experts"]["4"]))
    assert list(summary.warnings) == pruned["warnings"]
    assert [int(text.split()[1]) for text in pruned["warnings"]] == dropped


def test_the_command_line(tiny: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cal"
    command = ["calibrate", str(tiny), str(out), "--samples-from", str(samples), "--device", "cpu", "--json"]
    assert main([*command, "--prune", "11", "--criterion", "random", "--seed", "3", "--dry-run"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["needs_bytes"]["states"] == 2 * sum(LENGTHS) * 192 * 2 and report["stages"] == 21
    assert "Nothing was written" in captured.err and not out.exists()
    assert main([*command, "--prune", "11", "--criterion", "random", "--seed", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verified_stages"], report["stages"]) == (0, 21)
    assert open_calibration(out).document["pruned"]["seed"] == 3
    assert main(command) == 73
    assert "exists already" in json.loads(capsys.readouterr().out)["error"]
    assert main([*command[:3], "--samples-from", str(tmp_path), "--json"]) == 66
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--prune", "11", "--criterion", "random", "--seed", "-1"])
    assert "--seed: must not be negative" in capsys.readouterr().err


def test_a_quantized_checkpoint_is_not_pruned(options: CalibrationOptions, quantized: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match="is quantized: `prune` and `quantize` start from the plain"):
        calibrate(replace(options, checkpoint=quantized(), keep=KEEP))
    assert not options.out.with_name("cal.partial").exists()


def test_the_pilot_sees_every_part_of_the_mixture(small: Callable[..., CalibrationOptions]) -> None:
    options = small()
    write_samples(options.samples, [np.arange(9 + n % 3) for n in range(60)], held_out=[0, 31], vocabulary=96)
    path = options.samples / "samples.json"
    document = json.loads(path.read_text())
    document["mixture"] = [dict(document["mixture"][0], name=name) for name in ("text", "code", "chat")]
    for number, sample in enumerate(document["samples"]):
        sample["part"] = {31: 1, 32: 1, 33: 1, 57: 2}.get(number, 0)
    path.write_text(json.dumps(document))

    def pilot(wanted: int) -> set[int]:
        plan = make_plan(replace(options, keep=3, pilot_samples=wanted))
        return {number for batch in plan.pilot_batches for number in batch.numbers}

    assert (pilot(1), pilot(3)) == ({1}, {1, 32, 57})
    assert pilot(4) == {1, 2, 32, 57}
    assert pilot(5) == {1, 2, 32, 57, 59}, "the rest is spread over the set"
    assert pilot(1000) == set(range(60)) - {0, 31}
