"""What enters the first layer: rows of the embedding table, and the vision tower's features where pictures are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from step128_checkpoint.calibration.samples import SampleSet
from step128_checkpoint.calibration.weights import copy_rows, weight_shape
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from step128_checkpoint.calibration.vision import VisionTower

_TABLE = "model.embed_tokens.weight"


def embed(
    checkpoint: Checkpoint,
    samples: SampleSet,
    numbers: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
    on_vision_moments: Callable[[dict[str, Tensor]], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield each sample's number and its inputs [T, H] of the first layer, in the order of ``numbers``.

    Args:
        checkpoint: its files are open. Only rows of tokens that occur are read; the vision tower only if there is a
            picture.
        samples: made with this checkpoint's tokenizer.
        numbers: which samples.
        device: where the tower runs and the result is.
        dtype: float32 or bfloat16, of the tower and of the result.
        on_vision_moments: called once at the end, if there was a picture in a sample that is not held out, with the
            mean of x^2 of the inputs (float32 [K], on the CPU) of each linear layer of the tower and of the projector,
            by weight name.

    Raises:
        CheckpointError: the samples are of another tokenizer or model, or a picture or a tensor is bad.
    """
    table = _Table(checkpoint, dtype)
    tower: VisionTower | None = None
    for number in numbers:
        ids = samples.token_ids(number)
        hidden = table.rows(ids, samples).to(device)
        paths = samples.images(number)
        places = torch.from_numpy(np.flatnonzero(ids == checkpoint.config.get("image_token_id", -1)))
        features_found = 0
        if paths:
            # Only here: text needs neither Pillow nor torchvision.
            from step128_checkpoint.calibration import vision

            tower = tower or vision.VisionTower(checkpoint, dtype, device)
            tower.observing = on_vision_moments is not None and not samples.held_out[number]
            features = tower.features([vision.open_image(path) for path in paths])
            features_found = len(features)
        if features_found != len(places):
            raise CheckpointError(
                f"{samples.folder}: sample {number} has {len(places)} places for pictures, but the model makes "
                f"{features_found} features of its {len(paths)} pictures. Make the samples with this model's folder."
            )
        if paths:
            hidden[places.to(device)] = features
        yield number, hidden
    if tower is not None and on_vision_moments is not None and (moments := tower.moments()):
        on_vision_moments(moments)


class _Table:
    """The embedding table, of which each row is read when it is first asked for.

    Memory that was never written takes no space, so this costs what the rows that occur cost.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        shape = weight_shape(checkpoint, _TABLE)
        self._values = torch.empty(shape, dtype=dtype)
        self._present = np.zeros(shape[0], dtype=np.bool_)

    def rows(self, ids: NDArray[np.int32], samples: SampleSet) -> Tensor:
        """Rows [T, H] of token ids [T], on the CPU."""
        wanted = np.unique(ids)
        if wanted[-1] >= len(self._present):
            raise CheckpointError(
                f"{samples.folder}: token id {wanted[-1]} is outside this model's vocabulary of {len(self._present)}. "
                "Make the samples with this model's tokenizer."
            )
        missing = wanted[~self._present[wanted]]
        # Neighbouring rows are read at once.
        for run in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1):
            if len(run):
                first, last = int(run[0]), int(run[-1])
                copy_rows(self._checkpoint, _TABLE, self._values[first : last + 1], first)
        self._present[missing] = True
        return self._values[torch.from_numpy(ids.astype(np.int64))]
