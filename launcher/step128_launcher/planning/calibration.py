"""What earlier starts on this machine measured, by exact settings: one JSON file a machine.

The file is MACHINE.json below $XDG_DATA_HOME/step128/calibration (default ~/.local/share/...), schema 2:
{"schema": 2, "machine": KEY, "measurements": [{settings {...}, weights_bytes, activation_bytes, graph_bytes,
non_torch_bytes (each a number or null), date, vllm_version, source}]}.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from step128_launcher.files import make_private_folder, write_atomically
from step128_launcher.machine.types import Hardware
from step128_launcher.user_folders import user_folder

SCHEMA = 2
_DIGITS = 8
_GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """What the measured sizes depend on; `model` is the fingerprint of config.json."""

    model: str
    tensor_parallel_size: int
    num_speculative_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vision: bool
    attention_backend: str | None
    kv_cache_dtype: str
    enforce_eager: bool
    dtype: str
    enable_expert_parallel: bool


@dataclass(frozen=True)
class Measurement:
    """Bytes on one rank as vLLM reported them, None where it did not; `source` is the file they were read from."""

    settings: Settings
    weights_bytes: int | None
    activation_bytes: int | None
    graph_bytes: int | None
    non_torch_bytes: int | None
    date: str
    vllm_version: str
    source: str

    @property
    def is_empty(self) -> bool:
        """Whether it measures nothing: on a CPU vLLM reports none of these sizes."""
        sizes = (self.weights_bytes, self.activation_bytes, self.graph_bytes, self.non_torch_bytes)
        return all(size is None for size in sizes)


@dataclass(frozen=True)
class Calibration:
    """The measurements of a machine; `warning` is not empty if its file could not be read."""

    measurements: tuple[Measurement, ...]
    warning: str = ""


def machine_key(hardware: Hardware) -> str:
    """Return a name that stays the same over restarts of the machine, for example "4x-gfx1201-1a2b3c4d".

    Over the GPUs' PCI ids, targets and memory sizes, or without GPUs over the CPUs and the memory in whole GiB.
    """
    gpus = sorted((gpu.pci_id, gpu.target or "", gpu.vram_total_bytes or 0) for gpu in hardware.usable_gpus)
    if gpus:
        targets = Counter(gpu.target or gpu.vendor for gpu in hardware.usable_gpus)
        prefix = "-".join(f"{count}x-{target}" for target, count in sorted(targets.items()))
        identity: Any = gpus
    else:
        prefix = f"{len(hardware.cpu_ids)}x-cpu"
        identity = [len(hardware.cpu_ids), round(hardware.memory_total_bytes / _GIB)]
    return f"{prefix}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:_DIGITS]}"


def model_fingerprint(model: Path) -> str:
    """Return the first 12 digits of the SHA-256 of `model`/config.json. Raises OSError if it cannot be read."""
    return hashlib.sha256((model / "config.json").read_bytes()).hexdigest()[:12]


def calibration_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of all machines' files."""
    return user_folder("XDG_DATA_HOME", environment) / "calibration"


def load_calibration(hardware: Hardware, folder: Path | None = None) -> Calibration:
    """Return what was measured on this machine, oldest first; nothing if its file is not there or broken."""
    return read_calibration((folder or calibration_folder()) / f"{machine_key(hardware)}.json")


def read_calibration(path: Path) -> Calibration:
    """Return the measurements in one file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}, this launcher reads {SCHEMA}")
        return Calibration(tuple(_parse(entry) for entry in document["measurements"]))
    except FileNotFoundError:
        return Calibration(())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return Calibration((), f"The calibration {path} cannot be read and is not used: {error!r}. Delete it.")


def save(measurement: Measurement, machine: str, folder: Path | None = None) -> Path:
    """Add a measurement to the machine's file, in place of one with the same settings; return the file.

    A broken file is kept beside it as .broken.

    Raises:
        LauncherError: 5 or 73, if it cannot be written.

    """
    folder = folder or calibration_folder()
    make_private_folder(folder)
    path = folder / f"{machine}.json"
    known = read_calibration(path)
    if known.warning and path.exists():
        path.replace(path.with_suffix(".broken"))
    others = [other for other in known.measurements if other.settings != measurement.settings]
    document = {
        "schema": SCHEMA,
        "machine": machine,
        "measurements": [asdict(entry) for entry in [*others, measurement]],
    }
    write_atomically(path, json.dumps(document, indent=1) + "\n")
    return path


def parse_settings(document: Mapping[str, Any]) -> Settings:
    """Return the Settings of a JSON object. Raises ValueError if one is missing, unknown or of a wrong type."""
    types: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("model", "kv_cache_dtype", "dtype"), (str,)),
        **dict.fromkeys(("vision", "enforce_eager", "enable_expert_parallel"), (bool,)),
        "attention_backend": (str, type(None)),
    }
    for field in fields(Settings):
        if type(document.get(field.name, ...)) not in types.get(field.name, (int,)):
            raise ValueError(f"settings: {field.name} is {document.get(field.name)!r}")
    return Settings(**{field.name: document[field.name] for field in fields(Settings)})


def _parse(entry: Mapping[str, Any]) -> Measurement:
    return Measurement(
        settings=parse_settings(entry["settings"]),
        weights_bytes=_size(entry["weights_bytes"]),
        activation_bytes=_size(entry["activation_bytes"]),
        graph_bytes=_size(entry["graph_bytes"]),
        non_torch_bytes=_size(entry["non_torch_bytes"]),
        date=str(entry["date"]),
        vllm_version=str(entry["vllm_version"]),
        source=str(entry["source"]),
    )


def _size(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a size is {value!r}")
    return value
