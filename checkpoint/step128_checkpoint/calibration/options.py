"""What a calibration is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from step128_checkpoint.pruning.criteria import Criterion

DtypeName = Literal["auto", "bfloat16", "float32"]
DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)

DEFAULT_BATCH_TOKENS = 16384
DEFAULT_PILOT_SAMPLES = 64


@dataclass(frozen=True)
class CalibrationOptions:
    """Of :func:`calibrate`.

    ``keep``: experts that each MoE layer keeps, None for all; ``criterion`` and ``seed`` (of ``random``) say which.
    ``hessians``: also the inputs' second-moment matrices, for GPTQ. ``device``: auto, cpu, cuda or cuda:N.
    ``dtype``: of weights and computation; auto is bfloat16, unless the checkpoint is wider. ``batch_tokens``: that go
    through a layer at once, padding included. ``pilot_samples``: that find the super-experts before anything is pruned.
    ``max_memory_bytes``: for a layer and its batch, on the device that computes; None: what is free there.
    ``restart``: forget an interrupted run.
    """

    checkpoint: Path
    samples: Path
    out: Path
    keep: int | None = None
    criterion: Criterion = "reap"
    seed: int = 0
    hessians: bool = False
    device: str = "auto"
    dtype: DtypeName = "auto"
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    pilot_samples: int = DEFAULT_PILOT_SAMPLES
    max_memory_bytes: int | None = None
    restart: bool = False
