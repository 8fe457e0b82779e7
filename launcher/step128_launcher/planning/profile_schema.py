"""The schema of a profile's YAML file: every key, what it must hold, and which field of Profile it becomes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.planning.profile_checks import (
    Check,
    a_flag,
    a_text,
    fraction,
    integer,
    list_of,
    number,
    one_of,
    parse_size,
    positive,
    variables,
)
from step128_launcher.planning.reserved import ATTENTION_BACKENDS, is_reserved_variable, reserved_flag

DEVICES = ("cpu", "rocm", "cuda")
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Assumption:
    """A figure nobody measured on this machine, and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class FasterDtype:
    """The KV-cache dtype that decodes faster, "fp8" or "auto" (the serving dtype), and what that rests on."""

    value: str
    source: str


@dataclass(frozen=True)
class AttentionBackend:
    """One of vLLM's attention backends; `why` says what its limits come from. No limit: None or no dtypes.

    `faster_kv_cache_dtype` is of the profile's GPU; None: nothing is known, and the profile's preference holds.
    """

    name: str
    max_model_len: int | None
    kv_cache_dtypes: tuple[str, ...]
    why: str
    faster_kv_cache_dtype: FasterDtype | None = None


@dataclass(frozen=True)
class _Optional:
    """A key that may be left out, and the value it then has."""

    entry: Any
    default: Any


@dataclass(frozen=True)
class _Sourced:
    """A mapping of value and source: the value becomes the field, the source goes to Profile.sources."""

    field: str
    check: Check


def read_profile_values(path: Path, document: Any) -> dict[str, Any]:
    """Return field of Profile -> value.

    Raises:
        LauncherError: 78, naming the file and the key, if a key is missing, unknown or has a value of the wrong kind.

    """
    values: dict[str, Any] = {"sources": ()}
    _read_section(path, "", document, _SCHEMA, values)
    return values


def bad_value(path: Path, key: str, wanted: str, found: object) -> LauncherError:
    """Return the error for a key whose value is of the wrong kind."""
    return LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path}: {key} needs {wanted}, found {found!r}.")


def _assumed(item: Check, make: Callable[[Any, str], object] = Assumption) -> Check:
    def check(value: Any) -> object:
        if not isinstance(value, dict) or set(value) != {"value", "source"}:
            raise ValueError("a mapping of value and source")
        try:
            return make(item(value["value"]), a_text(value["source"]))
        except ValueError as error:
            raise ValueError(f"a mapping of value ({error}, or a text is missing) and source (a text)") from error

    return check


def _backend_name(value: Any) -> str:
    if value not in ATTENTION_BACKENDS:
        raise ValueError("with a name that is one of " + ", ".join(ATTENTION_BACKENDS))
    return str(value)


def _argument(value: Any) -> str:
    argument = a_text(value)
    flag = reserved_flag(argument)
    if flag is not None:
        raise ValueError(f"an argument that the launcher does not decide itself (it does {flag})")
    return argument


def _environment(value: Any) -> tuple[tuple[str, str], ...]:
    found = variables(value)
    reserved = [name for name, _ in found if is_reserved_variable(name)]
    if reserved:
        raise ValueError(f"variables that the launcher does not decide itself (it does {', '.join(reserved)})")
    return found


def _backend(value: Any) -> AttentionBackend:
    allowed = {"name", "max_model_len", "kv_cache_dtypes", "why", "faster_kv_cache_dtype"}
    if not isinstance(value, dict) or "name" not in value or not set(value) <= allowed:
        raise ValueError("a mapping with name and, as needed, " + ", ".join(sorted(allowed - {"name"})))
    longest = value.get("max_model_len")
    dtypes = value.get("kv_cache_dtypes")
    faster = value.get("faster_kv_cache_dtype")
    return AttentionBackend(
        name=_backend_name(value["name"]),
        max_model_len=None if longest is None else integer(1)(longest),
        kv_cache_dtypes=() if dtypes is None else list_of(one_of("auto", "fp8"))(dtypes),
        why=a_text(value.get("why", "no limit")),
        faster_kv_cache_dtype=None if faster is None else _faster(faster),
    )


def _faster(value: Any) -> Any:
    try:
        return _assumed(one_of("auto", "fp8"), FasterDtype)(value)
    except ValueError as error:
        raise ValueError(f"with a faster_kv_cache_dtype that is {error}") from error


_ASSUMED_SIZE = _assumed(parse_size)

# YAML key -> (field of Profile, check), nested as in the file.
_SCHEMA: dict[str, Any] = {
    "description": ("description", a_text),
    "device": ("device", one_of(*DEVICES)),
    "advice": _Optional(("advice", a_text), ""),
    "match": _Optional(
        {
            "targets": ("match_targets", list_of(a_text)),
            "gpus": ("match_gpus", integer(1)),
            "memory": ("match_memory_bytes", parse_size),
            "memory_below": _Optional(("match_memory_below_bytes", parse_size), None),
            "unified": ("match_unified", a_flag),
        },
        {"match_targets": (), "match_gpus": 0, "match_memory_bytes": 0, "match_memory_below_bytes": None}
        | {"match_unified": False},
    ),
    "memory": {
        "usable_fraction": _Sourced("usable_fraction", fraction),
        "host_usable_fraction": _Optional(
            _Sourced("host_usable_fraction", fraction), Assumption(0.9, "the launcher's default, an assumption")
        ),
        "reserve": _Sourced("reserve_bytes", parse_size),
        "kv_cache_max": _Optional(("kv_cache_max_bytes", parse_size), None),
        "mm_processor_cache": _Sourced("mm_processor_cache_bytes", parse_size),
    },
    "processes": {
        "api_server": _Sourced("api_server_bytes", parse_size),
        "engine_core": _Sourced("engine_core_bytes", parse_size),
        "worker": _Sourced("worker_bytes", parse_size),
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
        "max_model_len": ("max_model_len", integer(1)),
        "min_model_len": ("min_model_len", integer(1)),
        "max_num_seqs": ("max_num_seqs", integer(1)),
        "max_num_batched_tokens": ("max_num_batched_tokens", integer(1)),
        "min_num_batched_tokens": _Optional(("min_num_batched_tokens", integer(1)), None),
        "num_speculative_tokens": ("num_speculative_tokens", integer(0, 3)),
        "tensor_parallel_sizes": ("tensor_parallel_sizes", list_of(integer(1), may_be_empty=False)),
    },
    "speed": _Optional(
        {
            "memory_bandwidth_gb_per_second": ("memory_bandwidth", _assumed(positive)),
            "bandwidth_efficiency": ("bandwidth_efficiency", _assumed(fraction)),
            "all_reduce_microseconds": ("all_reduce_microseconds", _assumed(number)),
        },
        {"memory_bandwidth": None, "bandwidth_efficiency": None, "all_reduce_microseconds": None},
    ),
    "vllm": {
        "dtype": ("dtype", one_of(*DTYPES)),
        "prefer_fp8_kv_cache": ("prefer_fp8_kv_cache", a_flag),
        "block_size": ("block_size", integer(1)),
        "block_size_multiple": ("block_size_multiple", integer(1)),
        "enforce_eager": ("enforce_eager", a_flag),
        "attention_backends": _Optional(("attention_backends", list_of(_backend)), ()),
        "arguments": _Optional(("arguments", list_of(_argument)), ()),
        "shutdown_timeout_seconds": ("shutdown_timeout_seconds", integer(0)),
        "start_timeout_seconds": ("start_timeout_seconds", integer(1)),
    },
    "environment": _Optional(("environment", _environment), ()),
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
        if isinstance(inner, dict) and key in section:
            _read_section(path, f"{prefix}{key}.", section[key], inner, values)
        elif key in section:
            try:
                _store(values, inner, _check_of(inner)(section[key]))
            except ValueError as error:
                raise bad_value(path, f"{prefix}{key}", str(error), section[key]) from error
        elif not optional:
            raise LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path}: the key {prefix}{key} is missing.")
        elif isinstance(inner, dict):
            values.update(entry.default)
        else:
            _store(values, inner, entry.default)


def _check_of(entry: Any) -> Check:
    return _assumed(entry.check) if isinstance(entry, _Sourced) else entry[1]


def _store(values: dict[str, Any], entry: Any, value: Any) -> None:
    if isinstance(entry, _Sourced):
        values[entry.field] = value.value
        values["sources"] = (*values["sources"], (entry.field, value.source))
    else:
        values[entry[0]] = value
