"""Hardware profiles: one YAML file each below `configs/profiles/`, read into a frozen Profile."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from step128_launcher.errors import ExitCode, LauncherError

DEVICES = ("cpu",)
DTYPES = ("bfloat16", "float32")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Profile:
    """Limits and defaults for one kind of machine; the meaning of each figure is in the YAML file."""

    name: str
    description: str
    device: str
    usable_fraction: float
    reserve_bytes: int
    kv_cache_max_bytes: int
    mm_processor_cache_bytes: int
    api_server_bytes: int
    engine_core_bytes: int
    worker_bytes: int
    max_model_len: int
    min_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_speculative_tokens: int
    tensor_parallel_size: int
    dtype: str
    prefer_fp8_kv_cache: bool
    block_size: int
    enforce_eager: bool
    shutdown_timeout_seconds: int
    start_timeout_seconds: int


def list_profiles(configs_dir: Path) -> list[str]:
    """Return the names of all profiles in `configs_dir`/profiles, sorted."""
    return sorted(path.stem for path in (configs_dir / "profiles").glob("*.yaml"))


def load_profile(configs_dir: Path, name: str) -> Profile:
    """Read and check one profile.

    Raises:
        LauncherError: 78, naming the file and the key, if the profile does not exist, a key is missing, unknown or
            has a value of the wrong kind.

    """
    path = configs_dir / "profiles" / f"{name}.yaml"
    names = list_profiles(configs_dir)
    if name not in names:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"There is no profile {name!r} in {path.parent}.",
            "Profiles: " + (", ".join(names) or "none") + ".",
        )
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path} cannot be read: {error}") from error
    values: dict[str, Any] = {}
    _read_section(path, "", document, _SCHEMA, values)
    profile = Profile(name=name, **values)
    if profile.min_model_len > profile.max_model_len:
        raise _bad(path, "limits.min_model_len", "a value not above limits.max_model_len", profile.min_model_len)
    if profile.block_size % 32:
        raise _bad(path, "vllm.block_size", "a multiple of 32 (vLLM's CPU attention)", profile.block_size)
    return profile


def _bad(path: Path, key: str, wanted: str, found: object) -> LauncherError:
    return LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path}: {key} needs {wanted}, found {found!r}.")


# A check returns the value to store, or raises ValueError saying what it wants.
_Check = Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return value


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


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError("a number above 0 and at most 1")
    return float(value)


def parse_size(value: Any) -> int:
    """Return bytes for a text such as "512MiB", "1.5 GiB" or "300000B".

    Raises:
        ValueError: saying what a size looks like.

    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|B)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size with its unit, such as 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS.get(match[2], 1))


# YAML key -> (field of Profile, check), nested as in the file.
_SCHEMA: dict[str, Any] = {
    "description": ("description", _text),
    "device": ("device", _one_of(*DEVICES)),
    "memory": {
        "usable_fraction": ("usable_fraction", _fraction),
        "reserve": ("reserve_bytes", parse_size),
        "kv_cache_max": ("kv_cache_max_bytes", parse_size),
        "mm_processor_cache": ("mm_processor_cache_bytes", parse_size),
    },
    "processes": {
        "api_server": ("api_server_bytes", parse_size),
        "engine_core": ("engine_core_bytes", parse_size),
        "worker": ("worker_bytes", parse_size),
    },
    "limits": {
        "max_model_len": ("max_model_len", _integer(1)),
        "min_model_len": ("min_model_len", _integer(1)),
        "max_num_seqs": ("max_num_seqs", _integer(1)),
        "max_num_batched_tokens": ("max_num_batched_tokens", _integer(1)),
        "num_speculative_tokens": ("num_speculative_tokens", _integer(0, 3)),
        "tensor_parallel_size": ("tensor_parallel_size", _integer(1)),
    },
    "vllm": {
        "dtype": ("dtype", _one_of(*DTYPES)),
        "prefer_fp8_kv_cache": ("prefer_fp8_kv_cache", _flag),
        "block_size": ("block_size", _integer(1)),
        "enforce_eager": ("enforce_eager", _flag),
        "shutdown_timeout_seconds": ("shutdown_timeout_seconds", _integer(0)),
        "start_timeout_seconds": ("start_timeout_seconds", _integer(1)),
    },
}


def _read_section(path: Path, prefix: str, section: Any, schema: dict[str, Any], values: dict[str, Any]) -> None:
    """Check one mapping of the file against `schema` and add its fields to `values`."""
    if not isinstance(section, dict):
        raise _bad(path, prefix.rstrip(".") or "the file", "a mapping of keys to values", section)
    for key in section:
        if key not in schema:
            raise LauncherError(
                ExitCode.BAD_CONFIGURATION,
                f"Profile {path}: unknown key {prefix}{key}.",
                "Known here: " + ", ".join(schema) + ".",
            )
    for key, entry in schema.items():
        if key not in section:
            raise LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path}: the key {prefix}{key} is missing.")
        if isinstance(entry, dict):
            _read_section(path, f"{prefix}{key}.", section[key], entry, values)
            continue
        field, check = entry
        try:
            values[field] = check(section[key])
        except ValueError as error:
            raise _bad(path, f"{prefix}{key}", str(error), section[key]) from error
