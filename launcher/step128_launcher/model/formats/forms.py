"""What the foreign formats share: the forms a weight may be stored in, and which of them a checkpoint chose."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from step128_launcher.model.model_weights import HEAD_GATES, Cut, Weight
from step128_launcher.model.quantization import Format
from step128_launcher.model.shards import StoredTensor
from step128_launcher.model.tensors import FLOAT_DTYPES, ExpectedTensor, plain

SCALE_DTYPES = FLOAT_DTYPES
INT32 = frozenset({"I32"})
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """One way to store a weight: the tensors that must be there, and those that may be."""

    required: tuple[ExpectedTensor, ...]
    optional: tuple[ExpectedTensor, ...] = ()


class ForeignFormat(Protocol):
    """A format as a checkpoint's quantization_config parametrizes it; `label` says how in a few words."""

    @property
    def method(self) -> str:
        """The quant_method."""

    @property
    def label(self) -> str:
        """What the figures are, e.g. "4-bit, groups of 128"."""

    @property
    def group_size(self) -> int | None:
        """Input columns that share a scale; None: all of a row."""

    def forms(self, weight: Weight) -> Iterable[Form]:
        """Yield the quantized forms of a weight [..., N, K], none if its shape cannot be packed so."""


class TensorMaker:
    """Makes the tensors that stand for one weight, each divided among ranks like the weight where it has that axis."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.outer: Shape = weight.shape[:-2]
        self.rows, self.columns = weight.shape[-2:]
        self.prefix = weight.name.removesuffix("weight")

    def values(self, suffix: str, shape: Shape, dtypes: frozenset[str], *, transposed: bool = False) -> ExpectedTensor:
        """Return the tensor of the packed values; `shape` without the experts' axis, [rows, columns] or transposed."""
        return self._make(suffix, shape, dtypes, transposed, math.prod(self.weight.shape), "packed")

    def extra(self, suffix: str, shape: Shape, dtypes: frozenset[str], *, transposed: bool = False) -> ExpectedTensor:
        """Return a scale, zero point or index."""
        return self._make(suffix, shape, dtypes, transposed, 0, "scale")

    def _make(
        self, suffix: str, shape: Shape, dtypes: frozenset[str], transposed: bool, parameters: int, role: str
    ) -> ExpectedTensor:
        full = (*self.outer, *shape)
        cut = self._cut(shape, transposed)
        return ExpectedTensor(self.prefix + suffix, full, dtypes, self.weight.component, parameters, cut, role)

    def _cut(self, shape: Shape, transposed: bool) -> Cut:
        """Return the weight's cut where the tensor has more than one entry along that axis; else every rank has it."""
        cut = self.weight.cut
        if cut is Cut.WHOLE or len(shape) != 2:
            return Cut.WHOLE
        axis = (cut is Cut.COLUMNS) != transposed
        return cut if shape[axis] > 1 else Cut.WHOLE

    def row_vector(self, suffix: str, dtypes: frozenset[str]) -> ExpectedTensor:
        """Return one entry a row, [N] instead of [N, 1]."""
        cut = Cut.WHOLE if self.weight.cut is Cut.COLUMNS else self.weight.cut
        shape = (*self.outer, self.rows)
        return ExpectedTensor(self.prefix + suffix, shape, dtypes, self.weight.component, 0, cut, "scale")

    def column_vector(self, suffix: str, dtypes: frozenset[str]) -> ExpectedTensor:
        """Return one entry a column, [K]."""
        cut = Cut.COLUMNS if self.weight.cut is Cut.COLUMNS else Cut.WHOLE
        shape = (*self.outer, self.columns)
        return ExpectedTensor(self.prefix + suffix, shape, dtypes, self.weight.component, 0, cut, "scale")

    def single(self, suffix: str, dtypes: frozenset[str]) -> tuple[ExpectedTensor, ...]:
        """Return the spellings of one value for the whole weight (or for each expert)."""
        return tuple(self.extra(suffix, shape, dtypes) for shape in ((1,), (), (1, 1)))


def choose_tensors(
    weights: Iterable[Weight], stored: Mapping[str, StoredTensor], form: Format, foreign: ForeignFormat
) -> dict[str, ExpectedTensor]:
    """Return name -> expectation: for each weight the form the shards hold, or the one they come closest to.

    A weight that no policy of ours may quantize, but for the head gates, must be unquantized: vLLM has no quantized
    router, norm or eh_proj.
    """
    may_be_quantized = {*form.components, HEAD_GATES}
    table: dict[str, ExpectedTensor] = {}
    for weight in weights:
        forms = [Form((plain(weight),))]
        if weight.component in may_be_quantized:
            forms = [*foreign.forms(weight), *forms]
        chosen = _closest(forms, stored)
        table.update((tensor.name, tensor) for tensor in chosen.required)
        for tensor in chosen.optional:
            if tensor.name in stored and (tensor.name not in table or _matches(tensor, stored)):
                table[tensor.name] = tensor
    return table


def _closest(forms: list[Form], stored: Mapping[str, StoredTensor]) -> Form:
    best, best_score = forms[-1], (0, 0)
    for form in forms:
        matching = sum(_matches(tensor, stored) for tensor in form.required)
        if matching == len(form.required):
            return form
        score = (matching, sum(tensor.name in stored for tensor in form.required))
        if score > best_score:
            best, best_score = form, score
    return best


def _matches(tensor: ExpectedTensor, stored: Mapping[str, StoredTensor]) -> bool:
    found = stored.get(tensor.name)
    return found is not None and found.shape == tensor.shape and found.dtype in tensor.dtypes
