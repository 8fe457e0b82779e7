"""Let vLLM define its Triton kernels where no GPU is, so that they can be compiled for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from step128_kernels.errors import ToolEnvironmentError


@contextmanager
def visible_triton() -> Iterator[None]:
    """Import vLLM in here: 0.32 replaces Triton by a placeholder unless exactly one driver is active.

    Its CPU build also wants a backend named "cpu". Nothing is launched through what stands in for them here.

    Raises:
        ToolEnvironmentError: if vLLM or Triton is missing, or vLLM was imported before without Triton.

    """
    try:
        import vllm  # noqa: F401
        from triton.backends import backends
    except ModuleNotFoundError as error:
        raise ToolEnvironmentError(f"vLLM's kernels need the package {error.name}, which is not installed.") from error
    stand_ins: dict[str, Any] = {"cpu": _stand_in(active=False)}
    if not any(backend.driver and backend.driver.is_active() for name, backend in backends.items() if name != "cpu"):
        stand_ins["offline"] = _stand_in(active=True)
    added = [name for name in stand_ins if name not in backends]
    backends.update({name: stand_ins[name] for name in added})
    try:
        from vllm.triton_utils import HAS_TRITON

        if not HAS_TRITON:
            raise ToolEnvironmentError("vLLM was loaded with its Triton kernels disabled. Run this in a new process.")
        yield
    finally:
        for name in added:
            del backends[name]


def _stand_in(active: bool) -> Any:
    return SimpleNamespace(driver=SimpleNamespace(is_active=lambda: active), compiler=None)
