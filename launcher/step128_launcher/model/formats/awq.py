"""`quant_method: awq`: 4-bit values packed along the output rows, stored transposed.

Source: vllm/model_executor/layers/quantization/awq.py: qweight int32 [K, N/8], qzeros int32 [K/group, N/8], scales
[K/group, N].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from step128_launcher.model.formats.fields import Fields
from step128_launcher.model.formats.forms import INT32, SCALE_DTYPES, Form, TensorMaker
from step128_launcher.model.model_weights import Weight

_PER_INT32 = 8


@dataclass(frozen=True)
class Awq:
    """`group_size` input columns share a scale and a zero point; None: all of them."""

    group_size: int | None
    method: str = "awq"

    @property
    def label(self) -> str:
        """Say the bits and the groups."""
        return f"4-bit, groups of {self.group_size}" if self.group_size else "4-bit, a scale a row"

    def forms(self, weight: Weight) -> Iterator[Form]:
        """Yield the one form, if the weight can be packed."""
        make = TensorMaker(weight)
        group = self.group_size or make.columns
        if make.rows % _PER_INT32 or make.columns % group:
            return
        packed, groups = make.rows // _PER_INT32, make.columns // group
        yield Form(
            (
                make.values("qweight", (make.columns, packed), INT32, transposed=True),
                make.extra("qzeros", (groups, packed), INT32, transposed=True),
                make.extra("scales", (groups, make.rows), SCALE_DTYPES, transposed=True),
            )
        )


def read_awq(fields: Fields) -> Awq:
    """Read a quantization_config of this method, in AutoAWQ's spelling or its older one."""
    older = fields.optional("bits") is None
    fields.choice("w_bit" if older else "bits", 4)
    return Awq(fields.group_size("q_group_size" if older else "group_size"))
