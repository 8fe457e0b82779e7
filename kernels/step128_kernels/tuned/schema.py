"""One file of `configs/tuned`: what it must hold, read with every mistake named by file and key."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_kernels.errors import KernelToolError
from step128_kernels.tuned.names import parse_file_name, spellings

SCHEMA = 1
PHASES = ("decode", "prefill")
MEASURED = "measured"
MODELLED = "modelled, not measured"

# A kernel's configuration: "phase" (decode or prefill), every other key a whole number that only the kernel knows.
Config = Mapping[str, Any]

PhaseKeys = Mapping[str, frozenset[str]]
"""Of each phase that a kernel has, the keys that its configurations need beside "phase"; no others are allowed."""

_KEYS = (
    *("schema", "kernel", "shape", "device", "arch", "source", "method", "date", "versions", "driver"),
    "configs",
)


class TuningFileError(KernelToolError):
    """A file of tuned configurations that cannot be used; the message names the file and the key."""

    exit_code = 78


@dataclass(frozen=True)
class TunedFile:
    """The part of a file that choosing a configuration needs; `configs` by number of rows (tokens)."""

    path: Path
    shape: Mapping[str, int]
    arch: str
    source: str
    configs: Mapping[int, Config]


def read_file(kernel: str, path: Path, keys: PhaseKeys | None = None) -> TunedFile:
    """Read and check a file of tuned configurations, whose name must be one of `kernel`.

    Args:
        kernel: e.g. `nl4_gemm`.
        path: of the file.
        keys: what the kernel reads; None leaves the keys of configurations unchecked.

    Raises:
        TuningFileError: if it cannot be read, is not JSON, of another schema, or any key is missing, unknown or wrong.

    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise TuningFileError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise TuningFileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise TuningFileError(f"{path} must hold a JSON object.")
    if document.get("schema") != SCHEMA:
        raise TuningFileError(
            f"{path}: schema is {document.get('schema')!r}, and this version of step128 reads {SCHEMA}."
        )
    _check_keys(path, document)
    _check_identity(path, document, kernel)
    configs = _configs(path, document["configs"])
    if keys is not None:
        for rows, config in configs.items():
            _check_config_keys(f"{path}: configs.{rows}", kernel, config, keys)
    return TunedFile(path, document["shape"], document["arch"], document["source"], configs)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def _check_keys(path: Path, document: dict[str, Any]) -> None:
    for key in _KEYS:
        if key not in document:
            raise TuningFileError(f"{path}: {key} is missing.")
    for key in document:
        if key not in _KEYS:
            raise TuningFileError(f"{path}: {key} is not a key of schema {SCHEMA}; those are {', '.join(_KEYS)}.")
    for key in ("kernel", "device", "arch", "source", "method", "date"):
        if not isinstance(document[key], str) or not document[key]:
            raise TuningFileError(f"{path}: {key} must be text, it is {document[key]!r}.")
    if not isinstance(document["versions"], dict):
        raise TuningFileError(f"{path}: versions must be an object, it is {document['versions']!r}.")
    if document["driver"] is not None and not isinstance(document["driver"], str):
        raise TuningFileError(f"{path}: driver must be text or null, it is {document['driver']!r}.")
    if document["source"] not in (MEASURED, MODELLED):
        raise TuningFileError(f"{path}: source is {document['source']!r}; it must be {MEASURED!r} or {MODELLED!r}.")


def _check_identity(path: Path, document: dict[str, Any], kernel: str) -> None:
    """What the file says it is must be what its name says, or a copied file would serve another shape or GPU."""
    if document["kernel"] != kernel:
        raise TuningFileError(f"{path}: kernel is {document['kernel']!r}, and its name is one of {kernel!r}.")
    shape = document["shape"]
    if not isinstance(shape, dict) or not all(_is_size(name, size) for name, size in shape.items()):
        raise TuningFileError(f"{path}: shape must give whole numbers above 0 (W may be 0), it is {shape!r}.")
    parsed = parse_file_name(kernel, path.name)
    if parsed is None:
        raise TuningFileError(f"{path}: this is no file name of {kernel}.")
    dimensions, device = parsed
    for dimension, size in dimensions.items():
        if shape.get(dimension) != size:
            raise TuningFileError(
                f"{path}: shape.{dimension} is {shape.get(dimension)!r}, and the file's name says {size}."
            )
    if document["device"] not in spellings(device):
        raise TuningFileError(f"{path}: device is {document['device']!r}, and the file's name says {device!r}.")


def _configs(path: Path, configs: Any) -> dict[int, Config]:
    if not isinstance(configs, dict) or not configs:
        raise TuningFileError(f"{path}: configs must hold a configuration per number of rows, it is {configs!r}.")
    for rows, config in configs.items():
        if not (rows.isascii() and rows.isdecimal() and not rows.startswith("0")):
            raise TuningFileError(f"{path}: configs.{rows}: the key must be a number of rows above 0.")
        _check_config(path, rows, config)
    return {int(rows): configs[rows] for rows in sorted(configs, key=int)}


def _check_config(path: Path, rows: str, config: Any) -> None:
    if not isinstance(config, dict) or config.get("phase") not in PHASES:
        phase = config.get("phase") if isinstance(config, dict) else config
        raise TuningFileError(
            f"{path}: configs.{rows}.phase is {phase!r}; it must be {' or '.join(map(repr, PHASES))}."
        )
    for key, value in config.items():
        if key != "phase" and not _is_whole(value):
            raise TuningFileError(f"{path}: configs.{rows}.{key} must be a whole number, it is {value!r}.")


def _check_config_keys(place: str, kernel: str, config: Config, keys: PhaseKeys) -> None:
    """Without this a misspelled key would end in a KeyError of the kernel, which names no file."""
    phase = config["phase"]
    if phase not in keys:
        raise TuningFileError(f"{place}.phase is {phase!r}, and {kernel} has only {', '.join(keys)}.")
    wanted = {"phase"} | keys[phase]
    for key in sorted(config.keys() - wanted):
        raise TuningFileError(
            f"{place}.{key} is not a key of {kernel}'s {phase} configurations; those are {', '.join(sorted(wanted))}."
        )
    for key in sorted(wanted - config.keys()):
        raise TuningFileError(f"{place}.{key} is missing; a {phase} configuration of {kernel} needs it.")


def _is_size(name: str, value: Any) -> bool:
    return _is_whole(value) and value >= (0 if name == "W" else 1)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
