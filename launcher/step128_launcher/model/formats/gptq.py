"""`quant_method: gptq`: 2-, 4- or 8-bit values packed along the input columns, stored transposed.

Source: vllm/model_executor/layers/quantization/auto_gptq.py: qweight int32 [K * bits / 32, N], qzeros int32
[K/group, N * bits / 32], scales [K/group, N], g_idx int32 [K].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from step128_launcher.model.formats.fields import Fields
from step128_launcher.model.formats.forms import INT32, SCALE_DTYPES, Form, TensorMaker
from step128_launcher.model.model_weights import Weight


@dataclass(frozen=True)
class Gptq:
    """`group_size` input columns share a scale and a zero point; None: all of them."""

    bits: int
    group_size: int | None
    method: str = "gptq"

    @property
    def label(self) -> str:
        """Say the bits and the groups."""
        groups = f"groups of {self.group_size}" if self.group_size else "a scale a row"
        return f"{self.bits}-bit, {groups}"

    def forms(self, weight: Weight) -> Iterator[Form]:
        """Yield the one form, if the weight can be packed."""
        make = TensorMaker(weight)
        per_int32 = 32 // self.bits
        group = self.group_size or make.columns
        if make.rows % per_int32 or make.columns % per_int32 or make.columns % group:
            return
        groups = make.columns // group
        yield Form(
            (
                make.values("qweight", (make.columns // per_int32, make.rows), INT32, transposed=True),
                make.extra("qzeros", (groups, make.rows // per_int32), INT32, transposed=True),
                make.extra("scales", (groups, make.rows), SCALE_DTYPES, transposed=True),
            ),
            (make.column_vector("g_idx", INT32),),
        )


def read_gptq(fields: Fields) -> Gptq:
    """Read a quantization_config of this method."""
    return Gptq(fields.choice("bits", 2, 4, 8), fields.group_size("group_size"))
