"""quant_method -> how to read it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from step128_launcher.errors import CheckpointError
from step128_launcher.model.formats.awq import read_awq
from step128_launcher.model.formats.compressed_tensors import read_compressed_tensors
from step128_launcher.model.formats.fields import Fields
from step128_launcher.model.formats.forms import ForeignFormat
from step128_launcher.model.formats.fp8 import read_fp8
from step128_launcher.model.formats.gptq import read_gptq

_READERS: dict[str, Callable[[Fields], ForeignFormat]] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "awq": read_awq,
    "gptq": read_gptq,
}


def read_foreign(path: Path, section: dict[str, Any] | None, own: str) -> ForeignFormat | None:
    """Read a `quantization_config` (of the file `path`) of another tool; None: it is absent, or of our method `own`.

    Raises:
        CheckpointError: if the method is unknown, or the section is not as its tool writes it.

    """
    method = own if section is None else section.get("quant_method")
    if section is None or method == own:
        return None
    if not isinstance(method, str) or method not in _READERS:
        raise CheckpointError(
            f"{path}: quantization_config.quant_method is {method!r}; known are {', '.join((own, *_READERS))}.",
            "Serve a checkpoint in one of these formats, or quantize the bfloat16 one with step128-checkpoint.",
        )
    return _READERS[method](Fields(path, section, "quantization_config."))
