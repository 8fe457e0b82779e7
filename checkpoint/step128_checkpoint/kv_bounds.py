"""Whether the K scales of a checkpoint fit its own norms, which bound K: a check that needs no data."""

from __future__ import annotations

import numpy as np

from step128_checkpoint.dtypes import FLOAT_DTYPES
from step128_checkpoint.kv_scaling import E4M3_MAX, k_bound
from step128_checkpoint.reader import Checkpoint

MAX_OVER_BOUND = 64.0
"""Largest number that a K scale can store (448 scale), over the largest |K| that the norm allows.

E4M3's normal numbers reach from 448 down to 2^-6, a factor of 448 * 64. At 64 times the bound
sqrt(head_dim) * max|1 + w|, the coarser subnormals begin at bound / 448: with head_dim 128 that is a fortieth of
max|1 + w|, the largest root mean square of a channel of K. Further up, ordinary values lose bits. Neither the largest
headroom (16) nor an engine's default scale of 1 comes near. There is no lower limit: K may stay far below its bound.
"""


def k_scale_problems(checkpoint: Checkpoint) -> list[str]:
    """Name the K scales that are too large for the layer's K norm (the checkpoint's files are open).

    Scales and norms that are missing, of a wrong type or not finite are left to the other checks.
    """
    problems = []
    for name, tensor in checkpoint.tensors.items():
        norm = checkpoint.tensors.get(name.replace(".k_proj.k_scale", ".k_norm.weight"))
        if not name.endswith(".self_attn.k_proj.k_scale") or (tensor.dtype, tensor.shape) != ("F32", (1,)):
            continue
        if norm is None or norm.dtype not in FLOAT_DTYPES or not norm.elements:
            continue
        bound = k_bound(checkpoint, int(name.split(".")[2]))
        stored = E4M3_MAX * float(np.frombuffer(checkpoint.read(name), dtype="<f4")[0])
        if np.isfinite(bound) and np.isfinite(stored) and stored > MAX_OVER_BOUND * bound:
            problems.append(
                f"{tensor.path}: tensor {name} stores K up to {stored:.4g}, but the layer's norm allows no more than "
                f"{bound:.4g}: over {MAX_OVER_BOUND:g} times that, small values lose bits. Calibrate again."
            )
    return problems
