"""The calibration that `quantize` makes by itself: the default mixture, the checkpoint as it is, nothing pruned.

It runs in processes of its own: torch's memory is free again before quantization, which promises a limit, begins.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from step128_checkpoint.calibration.match import check_match
from step128_checkpoint.calibration.result import CALIBRATION_NAME, Calibration, open_calibration
from step128_checkpoint.calibration.samples import open_samples
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.reader import Checkpoint

_STDERR = 2  # what those commands print for people must not mix with --json
_COMMAND = "import sys; from step128_checkpoint.cli import main; sys.exit(main(sys.argv[1:]))"


class _CommandFailedError(CheckpointError):
    """A command that was run on the way failed, and has said why."""

    def __init__(self, name: str, exit_code: int) -> None:
        super().__init__(f"`{name}` ended with exit code {exit_code}: its message is above")
        self.exit_code = exit_code


def calibrate_for(checkpoint: Checkpoint, folder: Path, samples: int, tokens: int, device: str) -> Calibration:
    """Build samples and calibrate in ``folder`` (``samples/`` and ``sweep/``); what is finished there is used again.

    Args:
        checkpoint: to be quantized.
        folder: stays, so that a further quantization of the same checkpoint starts at once.
        samples: how many.
        tokens: of each.
        device: auto, cpu, or torch's name of a GPU.

    Raises:
        ConfigurationError: there are samples of another number or length.
        CheckpointError: and its kinds, from building samples and calibrating.
    """
    console = Console(stderr=True)
    sample_folder, sweep = folder / "samples", folder / "sweep"
    if sample_folder.exists():
        _check_samples(sample_folder, samples, tokens)
    else:
        console.print(f"No --calibration is given: making one in {escape(str(folder))}")
        _run("samples", sample_folder, "--tokenizer", checkpoint.folder, "--samples", samples, "--tokens", tokens)
    if (sweep / CALIBRATION_NAME).exists():
        console.print(f"Using the calibration in {escape(str(sweep))}")
    else:
        _run("calibrate", checkpoint.folder, sweep, "--samples-from", sample_folder, "--device", device)
    calibration = open_calibration(sweep)
    check_match(checkpoint, calibration)
    return calibration


def _check_samples(folder: Path, samples: int, tokens: int) -> None:
    found = open_samples(folder)
    made = sum(part.wanted for part in found.mixture), found.document.get("tokens_per_sample")
    if made != (samples, tokens):
        raise ConfigurationError(
            f"{folder.parent} holds a calibration of {made[0]} samples of {made[1]} tokens, not {samples} of {tokens}. "
            f"Delete that folder, or repeat --samples {made[0]} --tokens {made[1]}."
        )


def _run(name: str, *arguments: str | Path | int) -> None:
    command = [sys.executable, "-P", "-c", _COMMAND, name, *map(str, arguments)]
    done = subprocess.run(command, stdout=_STDERR, check=False)
    if done.returncode:
        raise _CommandFailedError(name, done.returncode if done.returncode > 0 else 1)
