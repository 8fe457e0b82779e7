"""Let ``import torchvision`` succeed beside a CPU build of torch.

vLLM's Step-3.7 needs torchvision (resize and tensor transforms), and PyPI's torchvision is built for CUDA: beside
CPU torch its C++ operators do not load, and the import dies at ``operator torchvision::nms does not exist`` because it
registers a meta kernel for an operator that nobody declared. Declaring the two operators first is enough; nothing
here computes them, and Step-3.7 never calls them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareOperators:
    """Import hook: runs once, when torchvision is about to be imported, so that torch is not imported before."""

    library: Any = None  # torch.library.Library drops its definitions when it is collected

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Declare the operators when torchvision is asked for; leave finding it to the ordinary finders."""
        if name == "torchvision" and self.library is None:
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
                for schema in _SCHEMAS:
                    self.library.define(schema)
        return None


def install() -> None:
    """Install the hook unless it is there, torchvision is imported already, or it is not installed at all."""
    if "torchvision" in sys.modules or any(isinstance(finder, _DeclareOperators) for finder in sys.meta_path):
        return
    if importlib.util.find_spec("torchvision") is not None:
        sys.meta_path.insert(0, _DeclareOperators())
