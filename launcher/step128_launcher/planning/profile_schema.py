"""The schema of a profile's YAML file: every key, what it must hold, and which field of Profile it becomes."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_launcher.errors import ExitCode, LauncherError

DEVICES = ("cpu", "rocm", "cuda")
DTYPES = ("bfloat16", "float32")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# A check returns the value to store, or raises ValueError saying what it wants.
_Check = Callable[[Any], Any]


@dataclass(frozen=True)
class Assumption:
    """A figure nobody measured on this machine, and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class AttentionBackend:
    """One of vLLM's attention backends; `why` says what its limits come from. No limit: None or no dtypes."""

    name: str
    max_model_len: int | None
    kv_cache_dtypes: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class _Optional:
    """A key that may be left out, and the value it then has."""

    entry: Any
    default: Any


def read_profile_values(path: Path, document: Any) -> dict[str, Any]:
    """Return field of Profile -> value.

    Raises:
        LauncherError: 78, naming the file and the key, if a key is missing, unknown or has a value of the wrong kind.

    """
    values: dict[str, Any] = {}
    _read_section(path, "", document, _SCHEMA, values)
    return values


def bad_value(path: Path, key: str, wanted: str, found: object) -> LauncherError:
    """Return the error for a key whose value is of the wrong kind."""
    return LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path}: {key} needs {wanted}, found {found!r}.")


def parse_size(value: Any) -> int:
    """Return bytes for a text such as "512MiB", "1.5 GiB" or "300000B".

    Raises:
        ValueError: saying what a size looks like.

    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|B)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size with its unit, such as 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS.get(match[2], 1))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return " ".join(value.split())


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _one_of(*choices: str) -> _Check:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return str(value)

    return check


def _integer(minimum: int, maximum: int | None = None) -> _Check:
    def check(value: Any) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < minimum
            or (maximum is not None and value > maximum)
        ):
            limit = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"a whole number {limit}")
        return value

    return check


def _is_no_number(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


def _number(value: Any) -> float:
    if _is_no_number(value) or not 0 <= value < math.inf:
        raise ValueError("a number that is not negative")
    return float(value)


def _positive(value: Any) -> float:
    if _is_no_number(value) or not 0 < value < math.inf:
        raise ValueError("a number above 0")
    return float(value)


def _fraction(value: Any) -> float:
    if _is_no_number(value) or not 0 < value <= 1:
        raise ValueError("a number above 0 and at most 1")
    return float(value)


def _list(item: _Check, *, may_be_empty: bool = True) -> _Check:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (value or may_be_empty):
            raise ValueError("a list" if may_be_empty else "a list of at least one entry")
        try:
            return tuple(map(item, value))
        except ValueError as error:
            raise ValueError(f"a list, each entry {error}") from error

    return check


def _assumed(item: _Check) -> _Check:
    def check(value: Any) -> Assumption:
        if not isinstance(value, dict) or set(value) != {"value", "source"}:
            raise ValueError("a mapping of value and source")
        try:
            return Assumption(item(value["value"]), _text(value["source"]))
        except ValueError as error:
            raise ValueError(f"a mapping of value ({error}, or a text is missing) and source (a text)") from error

    return check


def _variables(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        raise ValueError('a mapping of variable to text (a number needs quotes: "1")')
    return tuple(value.items())


def _backend(value: Any) -> AttentionBackend:
    allowed = {"name", "max_model_len", "kv_cache_dtypes", "why"}
    if not isinstance(value, dict) or "name" not in value or not set(value) <= allowed:
        raise ValueError("a mapping with name and, as needed, " + ", ".join(sorted(allowed - {"name"})))
    longest = value.get("max_model_len")
    dtypes = value.get("kv_cache_dtypes")
    return AttentionBackend(
        name=_text(value["name"]),
        max_model_len=None if longest is None else _integer(1)(longest),
        kv_cache_dtypes=() if dtypes is None else _list(_one_of("auto", "fp8"))(dtypes),
        why=_text(value.get("why", "no limit")),
    )


_ASSUMED_SIZE = _assumed(parse_size)

# YAML key -> (field of Profile, check), nested as in the file.
_SCHEMA: dict[str, Any] = {
    "description": ("description", _text),
    "device": ("device", _one_of(*DEVICES)),
    "advice": _Optional(("advice", _text), ""),
    "match": _Optional(
        {
            "targets": ("match_targets", _list(_text)),
            "gpus": ("match_gpus", _integer(1)),
            "memory": ("match_memory_bytes", parse_size),
            "memory_below": _Optional(("match_memory_below_bytes", parse_size), None),
            "unified": ("match_unified", _flag),
        },
        {"match_targets": (), "match_gpus": 0, "match_memory_bytes": 0, "match_memory_below_bytes": None}
        | {"match_unified": False},
    ),
    "memory": {
        "usable_fraction": ("usable_fraction", _fraction),
        "host_usable_fraction": _Optional(("host_usable_fraction", _fraction), 0.9),
        "reserve": ("reserve_bytes", parse_size),
        "kv_cache_max": _Optional(("kv_cache_max_bytes", parse_size), None),
        "mm_processor_cache": ("mm_processor_cache_bytes", parse_size),
    },
    "processes": {
        "api_server": ("api_server_bytes", parse_size),
        "engine_core": ("engine_core_bytes", parse_size),
        "worker": ("worker_bytes", parse_size),
    },
    "assumptions": _Optional(
        {
            "runtime_context": ("runtime_context", _ASSUMED_SIZE),
            "collectives": ("collectives", _ASSUMED_SIZE),
            "graphs": ("graphs", _ASSUMED_SIZE),
        },
        {"runtime_context": None, "collectives": None, "graphs": None},
    ),
    "limits": {
        "max_model_len": ("max_model_len", _integer(1)),
        "min_model_len": ("min_model_len", _integer(1)),
        "max_num_seqs": ("max_num_seqs", _integer(1)),
        "max_num_batched_tokens": ("max_num_batched_tokens", _integer(1)),
        "min_num_batched_tokens": _Optional(("min_num_batched_tokens", _integer(1)), None),
        "num_speculative_tokens": ("num_speculative_tokens", _integer(0, 3)),
        "tensor_parallel_sizes": ("tensor_parallel_sizes", _list(_integer(1), may_be_empty=False)),
    },
    "speed": _Optional(
        {
            "memory_bandwidth_gb_per_second": ("memory_bandwidth", _assumed(_positive)),
            "bandwidth_efficiency": ("bandwidth_efficiency", _assumed(_fraction)),
            "all_reduce_microseconds": ("all_reduce_microseconds", _assumed(_number)),
        },
        {"memory_bandwidth": None, "bandwidth_efficiency": None, "all_reduce_microseconds": None},
    ),
    "vllm": {
        "dtype": ("dtype", _one_of(*DTYPES)),
        "prefer_fp8_kv_cache": ("prefer_fp8_kv_cache", _flag),
        "block_size": ("block_size", _integer(1)),
        "block_size_multiple": ("block_size_multiple", _integer(1)),
        "enforce_eager": ("enforce_eager", _flag),
        "attention_backends": _Optional(("attention_backends", _list(_backend)), ()),
        "arguments": _Optional(("arguments", _list(_text)), ()),
        "shutdown_timeout_seconds": ("shutdown_timeout_seconds", _integer(0)),
        "start_timeout_seconds": ("start_timeout_seconds", _integer(1)),
    },
    "environment": _Optional(("environment", _variables), ()),
}


def _read_section(path: Path, prefix: str, section: Any, schema: dict[str, Any], values: dict[str, Any]) -> None:
    """Check one mapping of the file against `schema` and add its fields to `values`."""
    if not isinstance(section, dict):
        raise bad_value(path, prefix.rstrip(".") or "the file", "a mapping of keys to values", section)
    for key in section:
        if key not in schema:
            raise LauncherError(
                ExitCode.BAD_CONFIGURATION,
                f"Profile {path}: unknown key {prefix}{key}.",
                "Known here: " + ", ".join(schema) + ".",
            )
    for key, entry in schema.items():
        optional = isinstance(entry, _Optional)
        inner = entry.entry if optional else entry
        if key not in section:
            if not optional:
                raise LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path}: the key {prefix}{key} is missing.")
            values.update(entry.default if isinstance(inner, dict) else {inner[0]: entry.default})
            continue
        if isinstance(inner, dict):
            _read_section(path, f"{prefix}{key}.", section[key], inner, values)
            continue
        field, check = inner
        try:
            values[field] = check(section[key])
        except ValueError as error:
            raise bad_value(path, f"{prefix}{key}", str(error), section[key]) from error
