"""The calibration sweep: stage after stage, each journaled when it is done, and the folder that appears at the end.

While it runs, ``CAL.partial/`` holds the journal, ``states-0`` and ``states-1`` (the hidden states before and after a
layer, in turns), ``stages/`` (what each finished stage measured) and ``checkpoint/``, which becomes ``CAL`` by a
rename.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

from step128_checkpoint.calibration.needs import check_disk, check_memory, needs_of
from step128_checkpoint.calibration.options import CalibrationOptions
from step128_checkpoint.calibration.plan import Plan, Stage, make_plan
from step128_checkpoint.calibration.result import CALIBRATION_NAME, HESSIANS_FOLDER, LayerSaliency
from step128_checkpoint.calibration.result_writer import pilot_super_experts, save_tensors, write_results
from step128_checkpoint.calibration.stages import (
    Measured,
    OnTokens,
    measure_embeddings,
    measure_last,
    measure_layer,
)
from step128_checkpoint.calibration.states import file_sha256
from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.files import read_json_object, sync_folder
from step128_checkpoint.journal import Journal
from step128_checkpoint.places import check_places, remove_work, work_folder
from step128_checkpoint.pruning.criteria import keep_experts
from step128_checkpoint.shards import disk_error

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, the tokens done in this run, and the tokens that this run will do."""


@dataclass(frozen=True)
class CalibrationSummary:
    """What :func:`calibrate` did. ``verified_stages`` are an interrupted run's; ``damaged`` says what of it was not as
    it was left, so that all was done again. ``tokens`` went through a layer in this run."""

    stages: int
    verified_stages: int
    damaged: str | None
    tokens: int
    seconds: float
    warnings: tuple[str, ...]


def calibrate(options: CalibrationOptions, on_progress: OnProgress | None = None) -> CalibrationSummary:
    """Measure a checkpoint on samples, in one sweep over its layers; continues an interrupted run.

    What fails before any stage is finished leaves nothing behind; after that, finished stages are kept.

    Raises:
        InputNotFoundError, PermissionDeniedError: checkpoint or samples are missing or may not be read.
        CheckpointError: one of them is bad, or they do not fit together, or a layer gives NaN (it is named).
        ConfigurationError: an option is impossible, or the memory does not suffice.
        OutputError: the folder exists, the disk is too small or full, or an interrupted run had other options.
    """
    plan = make_plan(options)
    needs = needs_of(plan)
    try:
        out = check_places(options.checkpoint, options.out)
        check_places(options.samples, out)
        work = work_folder(out)
        check_memory(plan, needs)
        check_disk(plan, needs, work)
        work.mkdir(parents=True, exist_ok=True)
        sweep = _Sweep(plan, work, on_progress)
        try:
            with plan.checkpoint:
                return sweep.run(out)
        finally:
            sweep.close()
    except OSError as error:
        raise disk_error(options.out, error) from error


class _Sweep:
    """One run of the sweep in its work folder."""

    def __init__(self, plan: Plan, work: Path, on_progress: OnProgress | None) -> None:
        self._plan, self._work, self._on_progress = plan, work, on_progress
        self._product, self._stages_folder = work / "checkpoint", work / "stages"
        self._journal = Journal(work, plan.fingerprint(), plan.options.restart)
        self._tokens_done = self._tokens_to_do = 0
        self._protected: frozenset[tuple[int, int]] | None = None

    def run(self, out: Path) -> CalibrationSummary:
        """Do what is left to do, and give the finished folder its name."""
        started, stages = time.monotonic(), self._plan.stages
        verified, damaged = (len(stages), None) if self._assembled() else self._verify()
        if verified == 0:
            self._start_over()
        self._tokens_to_do = sum(stage.tokens for stage in stages[verified:])
        for stage in stages[verified:]:
            self._run_stage(stage)
        if not self._assembled():
            for states in self._work.glob("states-*"):
                states.unlink()
            sha256 = self._write_results()
            sync_folder(self._product)
            self._journal.record(CALIBRATION_NAME, sha256, sync=True)
        pruned = read_json_object(self._product / CALIBRATION_NAME)["pruned"]
        shutil.rmtree(self._stages_folder, ignore_errors=True)
        os.rename(self._product, out)  # noqa: PTH104  replaces an empty folder, which Path.rename documents differently
        sync_folder(out.parent)
        remove_work(self._work)
        return CalibrationSummary(
            len(stages),
            verified,
            damaged,
            self._tokens_done,
            time.monotonic() - started,
            tuple(pruned["warnings"]) if pruned else (),
        )

    def close(self) -> None:
        """Release the journal; if nothing was finished, nothing stays."""
        if not self._journal.finished:
            self._start_over()
            remove_work(self._work)
        self._journal.close()

    def _start_over(self) -> None:
        for folder in (self._product, self._stages_folder):
            if folder.exists():
                shutil.rmtree(folder)
        for states in self._work.glob("states-*"):
            states.unlink()

    def _assembled(self) -> bool:
        """Whether the product is complete, and only its name is missing."""
        found = file_sha256(self._product / CALIBRATION_NAME)
        return found is not None and found == self._journal.finished.get(CALIBRATION_NAME)

    def _verify(self) -> tuple[int, str | None]:
        """How many stages are finished and intact; or, if one is damaged, 0 and what is.

        The states that led to a stage are overwritten by the next but one, so a damaged stage cannot be redone alone.
        """
        journal, stages = self._journal, self._plan.stages
        finished = list(takewhile(lambda stage: stage.name in journal.finished, stages))
        expected: dict[Path, str] = {}
        for stage in finished:
            expected[self._file(stage)] = journal.finished[stage.name]
            for name, sha256 in journal.notes[stage.name].get("hessians", {}).items():
                expected[self._product / HESSIANS_FOLDER / name] = sha256
        if 0 < len(finished) < len(stages) and stages[len(finished)].index > 0:
            expected[self._states(finished[-1])] = journal.notes[finished[-1].name]["states"]
        damaged = next((path for path, sha256 in expected.items() if file_sha256(path) != sha256), None)
        if damaged is None:
            return len(finished), None
        journal.close()
        self._journal = Journal(self._work, self._plan.fingerprint(), restart=True)
        return 0, damaged.name

    def _run_stage(self, stage: Stage) -> None:
        started = time.monotonic()
        try:
            measured = self._measure(stage)
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"{stage.name}: {self._plan.device} has not enough memory for {self._plan.options.batch_tokens} tokens "
                "at once. Run the same command again with a smaller --batch-tokens: it continues."
            ) from error
        notes = measured.notes
        if measured.hessians:
            folder = self._product / HESSIANS_FOLDER
            notes["hessians"] = {name: save_tensors(folder / name, found) for name, found in measured.hessians.items()}
        sha256 = save_tensors(self._file(stage), measured.tensors)
        # The next stage overwrites what this one has read, so a power cut must not take this one away again.
        for folder in (self._product, self._work, self._work.parent):
            if folder.exists():
                sync_folder(folder)
        self._journal.record(stage.name, sha256, notes | {"seconds": time.monotonic() - started}, sync=True)
        if self._plan.device.type == "cuda":
            torch.cuda.empty_cache()  # layers differ in their tensors' sizes: leftovers of one would not serve the next

    def _measure(self, stage: Stage) -> Measured:
        source, target = self._work / f"states-{(stage.index + 1) % 2}", self._states(stage)
        if stage.kind == "embeddings":
            return measure_embeddings(self._plan, stage, target, self._advance(stage))
        if stage.kind == "last":
            return measure_last(self._plan, source, self._advance(stage))
        pruning = self._plan.options.keep is not None and not stage.pilot
        return measure_layer(self._plan, stage, source, target, self._choose if pruning else None, self._advance(stage))

    def _advance(self, stage: Stage) -> OnTokens:
        def advance(tokens: int) -> None:
            self._tokens_done += tokens
            if self._on_progress is not None:
                self._on_progress(stage.name, self._tokens_done, self._tokens_to_do)

        return advance

    def _choose(self, number: int, saliency: LayerSaliency) -> tuple[int, ...]:
        options = self._plan.options
        assert options.keep is not None
        protected = {expert for layer, expert in self._super_experts() if layer == number}
        return keep_experts(saliency, options.keep, options.criterion, protected, options.seed, number)

    def _super_experts(self) -> frozenset[tuple[int, int]]:
        if self._protected is None:
            pilot = [self._file(stage) for stage in self._plan.stages if stage.pilot]
            self._protected = pilot_super_experts(pilot) if pilot else frozenset()
        return self._protected

    def _write_results(self) -> str:
        self._product.mkdir(exist_ok=True)
        stages = self._plan.stages
        files = [self._file(stage) for stage in stages if not stage.pilot]
        notes = [self._journal.notes[stage.name] for stage in stages]
        return write_results(self._plan, files, notes, self._super_experts(), self._product)

    def _file(self, stage: Stage) -> Path:
        return self._stages_folder / (stage.name.replace(" ", "-") + ".safetensors")

    def _states(self, stage: Stage) -> Path:
        return self._work / f"states-{stage.index % 2}"
