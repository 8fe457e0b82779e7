"""The calibration that `quantize` makes by itself: the default mixture, the checkpoint as it is, nothing pruned."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from step128_checkpoint.calibration.building.cli import build_with_progress
from step128_checkpoint.calibration.building.mixture import DEFAULT_MIXTURE, load_mixture
from step128_checkpoint.calibration.cli import calibrate_with_progress
from step128_checkpoint.calibration.match import check_match
from step128_checkpoint.calibration.options import CalibrationOptions
from step128_checkpoint.calibration.result import CALIBRATION_NAME, Calibration, open_calibration
from step128_checkpoint.reader import Checkpoint


def calibrate_for(checkpoint: Checkpoint, folder: Path, samples: int, tokens: int, device: str) -> Calibration:
    """Build samples and calibrate in ``folder`` (``samples/`` and ``sweep/``); what is finished there is used again.

    Args:
        checkpoint: to be quantized.
        folder: stays, so that a further quantization of the same checkpoint starts at once.
        samples: how many.
        tokens: of each.
        device: auto, cpu, or torch's name of a GPU.

    Raises:
        CheckpointError: and its kinds, from building samples and calibrating.
    """
    console = Console(stderr=True)
    sample_folder, sweep = folder / "samples", folder / "sweep"
    if (sweep / CALIBRATION_NAME).exists():
        console.print(f"Using the calibration in {escape(str(sweep))}")
    else:
        if not sample_folder.exists():
            console.print(f"No --calibration is given: making one in {escape(str(folder))}")
            mixture = load_mixture(DEFAULT_MIXTURE)
            build_with_progress(mixture, checkpoint.folder, sample_folder, samples, tokens, seed=0)
        options = CalibrationOptions(checkpoint.folder, sample_folder, sweep, device=device)
        calibrate_with_progress(options, console)
    calibration = open_calibration(sweep)
    check_match(checkpoint, calibration)
    return calibration
