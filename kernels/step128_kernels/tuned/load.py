"""Which configuration a kernel runs with: files found by name, the nearest number of rows, and what to do without any.

The files are written by ``step128-kernels tune``; `configs/tuned/README.md` describes them. The loader knows nothing of
what a configuration's numbers mean: the kernel that gets them does.
"""

import logging
import math
import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from step128_kernels.tuned.names import (
    SUPPORTED_ARCHS,
    file_name,
    format_shape,
    parse_file_name,
    spellings,
    tune_command,
)
from step128_kernels.tuned.schema import Config, PhaseKeys, TunedFile, TuningFileError, read_file

CONFIGS_DIR_VARIABLE = "STEP128_CONFIGS_DIR"
TUNED_DIR_VARIABLE = "STEP128_TUNED_DIR"
"""Names a folder of the user's own files, which is searched before the shipped ones."""

_BUILT_IN = "built in"

_log = logging.getLogger(__name__)
_warned: set[str] = set()

__all__ = ["CONFIGS_DIR_VARIABLE", "TUNED_DIR_VARIABLE", "Config", "TunedTable", "TuningFileError", "load_config"]


@dataclass(frozen=True)
class TunedTable:
    """A kernel's configurations for one shape on one GPU, by number of rows (tokens).

    `source`: "measured", "modelled, not measured", or "built in"; `path` is the file they came from, if any; `exact`:
    made for this very shape and GPU.
    """

    configs: Mapping[int, Config]
    source: str
    path: Path | None = None
    exact: bool = False

    def nearest(self, rows: int) -> Config:
        """Return the configuration of the nearest number of rows, of two equally near ones that of the smaller.

        vLLM takes the nearest too, and of two the one that comes first in its file.
        """
        return self.configs[min(self.configs, key=lambda tuned: (abs(tuned - rows), tuned))]


def load_config(
    kernel: str,
    shape: Mapping[str, int],
    device_name: str,
    arch: str,
    *,
    default: Mapping[int, Config],
    keys: PhaseKeys | None = None,
) -> TunedTable:
    """Return the configurations to use for a kernel, shape and GPU; files are looked up once per process.

    Taken is the file of this shape and GPU; else, with one warning, that of the nearest shape on any GPU of the same
    arch; else, with that warning, `default`. An arch that nothing is tuned for gets `default` without a warning.

    Args:
        kernel: e.g. `nl4_gemm`.
        shape: all dimensions the kernel is tuned by, e.g. `{"N": 2560, "K": 4096}`; never the number of rows.
        device_name: in any spelling, e.g. `AMD Radeon AI PRO R9700`.
        arch: e.g. `gfx1201`.
        default: configurations by number of rows; at least one.
        keys: of each phase the keys that a configuration must have beside "phase", and no others; None checks none.

    Raises:
        TuningFileError: if a file of that kernel is broken, or $STEP128_TUNED_DIR or $STEP128_CONFIGS_DIR names no
            folder.
        ValueError: for an unknown kernel, or a shape without a dimension that file names hold.

    """
    if arch in SUPPORTED_ARCHS:
        folders = tuned_folders(os.environ.get(TUNED_DIR_VARIABLE), os.environ.get(CONFIGS_DIR_VARIABLE))
        known = None if keys is None else tuple(sorted(keys.items()))
        table = _load(kernel, tuple(shape.items()), device_name, arch, folders, known)
        if table is not None:
            return table
    return TunedTable(default, _BUILT_IN)


@cache
def tuned_folders(own: str | None, configs: str | None) -> tuple[Path, ...]:
    """Return the folders searched for tuned files, first the user's own, if named, then the shipped one, if there.

    Args:
        own: value of $STEP128_TUNED_DIR.
        configs: value of $STEP128_CONFIGS_DIR, which replaces the checkout's `configs/` and the wheel's data folder.

    """
    shipped = shipped_folder(configs)
    return (
        *([_existing(TUNED_DIR_VARIABLE, own)] if own else []),
        *([shipped] if shipped is not None and shipped.is_dir() else []),
    )


def shipped_folder(configs: str | None) -> Path | None:
    """Return `tuned/` in the folder of our configuration files, whether it exists or not; None without such a folder.

    Args:
        configs: value of $STEP128_CONFIGS_DIR.

    """
    if configs:
        return _existing(CONFIGS_DIR_VARIABLE, configs) / "tuned"
    candidates = [
        Path(__file__).resolve().parents[3] / "configs",
        Path(sysconfig.get_path("data")) / "share" / "step128" / "configs",
    ]
    return next((folder / "tuned" for folder in candidates if folder.is_dir()), None)


def _existing(variable: str, value: str) -> Path:
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise TuningFileError(f"{variable} is {value!r}, which is not a folder; unset it, or create the folder.")
    return folder


@cache
def _load(
    kernel: str,
    shape_items: tuple[tuple[str, int], ...],
    device_name: str,
    arch: str,
    folders: tuple[Path, ...],
    key_items: tuple[tuple[str, frozenset[str]], ...] | None,
) -> TunedTable | None:
    shape = dict(shape_items)
    read = partial(read_file, kernel, keys=None if key_items is None else dict(key_items))
    wanted = file_name(kernel, shape, spellings(device_name)[0])
    found = _exact(kernel, shape, device_name, arch, folders, read)
    if found is not None:
        return TunedTable(found.configs, found.source, found.path, exact=True)
    found = _nearest_shape(kernel, shape, arch, folders, read)
    if wanted not in _warned:
        _warned.add(wanted)
        _log.warning(
            "No tuned configuration of %s for %s on %s: %s was looked for in %s. Using %s instead. "
            "The command that makes it, by measuring where that GPU is and by the cost model elsewhere: %s",
            *(kernel, format_shape(shape), spellings(device_name)[0], wanted),
            " and ".join(map(str, folders)) or f"no folder ({TUNED_DIR_VARIABLE} is not set, and none is shipped)",
            "the built-in default" if found is None else f"{found.path.name} ({found.source})",
            tune_command(kernel, shape, device_name, arch),
        )
    return None if found is None else TunedTable(found.configs, found.source, found.path)


def _exact(
    kernel: str,
    shape: Mapping[str, int],
    device_name: str,
    arch: str,
    folders: tuple[Path, ...],
    read: Callable[[Path], TunedFile],
) -> TunedFile | None:
    """Names hold only some dimensions, so a file of this name may be of another shape; it is passed over then."""
    for folder in folders:
        for spelling in spellings(device_name):
            path = folder / file_name(kernel, shape, spelling)
            if not path.exists():
                continue
            found = read(path)
            if found.arch != arch:
                raise TuningFileError(f"{path}: arch is {found.arch!r}, and this GPU is {arch!r}.")
            if dict(found.shape) == dict(shape):
                return found
    return None


def _nearest_shape(
    kernel: str,
    shape: Mapping[str, int],
    arch: str,
    folders: tuple[Path, ...],
    read: Callable[[Path], TunedFile],
) -> TunedFile | None:
    """Nearest by the ratios of all dimensions; of equally near ones the first folder's, then the first by name."""
    files = [
        read(path)
        for folder in folders
        for path in sorted(folder.glob("*.json"))
        if parse_file_name(kernel, path.name) is not None
    ]
    near = [file for file in files if file.arch == arch and file.shape.keys() == shape.keys()]
    return min(near, key=lambda file: _distance(file.shape, shape), default=None)


def _distance(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    # A window of 0 means none; no other dimension is 0.
    return sum(abs(math.log2(max(one[name], 1) / max(other[name], 1))) for name in sorted(one))
