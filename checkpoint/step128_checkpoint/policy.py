"""Reads ``configs/quantization/nl4.yaml``: which tensors each policy quantizes. Nothing else decides that."""

from __future__ import annotations

import os
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from step128_checkpoint.errors import ConfigurationError
from step128_kernels import codebook

PACKED_SUFFIX = "_packed"
SCALE_SUFFIX = "_scale"
"""A quantized weight's name ends in "weight"; the two tensors that replace it end in these besides."""

_LAYER_KINDS = ("main", "mtp", "vision")


@dataclass(frozen=True)
class Policy:
    """One policy. ``components`` are quantized, ``unquantized`` are the file's other components, both in file order."""

    name: str
    components: tuple[str, ...]
    unquantized: tuple[str, ...]
    patterns: dict[str, tuple[str, ...]]
    """Every component of the file, quantized or not, with its tensor-name patterns."""

    def component_of(self, tensor_name: str, num_hidden_layers: int) -> str | None:
        """The component that a tensor belongs to, or None for the tensors that are never quantized."""
        for component, patterns in self.patterns.items():
            if any(_matches(pattern, tensor_name, num_hidden_layers) for pattern in patterns):
                return component
        return None

    def quantizes(self, tensor_name: str, num_hidden_layers: int) -> bool:
        """Whether this policy quantizes the tensor."""
        return self.component_of(tensor_name, num_hidden_layers) in self.components


def _matches(pattern: str, tensor_name: str, num_hidden_layers: int) -> bool:
    match = _regex(pattern).fullmatch(tensor_name)
    if match is None:
        return False
    for kind, number in match.groupdict().items():
        if (kind == "main" and int(number) >= num_hidden_layers) or (kind == "mtp" and int(number) < num_hidden_layers):
            return False
    return True


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    regex = re.escape(pattern)
    for kind in _LAYER_KINDS:
        regex = regex.replace(re.escape(f"{{{kind}}}"), rf"(?P<{kind}>[0-9]{{1,9}})")
    return re.compile(regex)


def configs_folder() -> Path:
    """Where ``configs/`` is: ``$STEP128_CONFIGS_DIR``, else the checkout's, else the installed one.

    Raises:
        ConfigurationError: it is in none of these places.
    """
    candidates = [
        Path(__file__).resolve().parents[2] / "configs",
        Path(sysconfig.get_path("data")) / "share" / "step128" / "configs",
    ]
    if configured := os.environ.get("STEP128_CONFIGS_DIR"):
        candidates = [Path(configured)]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise ConfigurationError(
        f"no configs folder at {' or '.join(map(str, candidates))}. "
        "Set STEP128_CONFIGS_DIR to the repository's configs/."
    )


def load_policy(name: str | None = None, path: Path | None = None) -> Policy:
    """Read one policy from the policy file.

    Args:
        name: the policy's name; None means the file's ``default_policy``.
        path: the policy file; None means ``quantization/nl4.yaml`` in :func:`configs_folder`.

    Raises:
        ConfigurationError: the file is missing, malformed or of another format version, or it has no such policy.
    """
    path = path or configs_folder() / "quantization" / "nl4.yaml"
    document = _read(path)
    components = _lists_of_names(path, document, "components")
    policies = _lists_of_names(path, document, "policies")
    for policy, wanted in policies.items():
        if unknown := [component for component in wanted if component not in components]:
            raise ConfigurationError(f"{path}: policy {policy} names the unknown component {unknown[0]}")
    name = name or str(document.get("default_policy"))
    if name not in policies:
        raise ConfigurationError(f"{path}: no policy named {name!r}. It has: {', '.join(policies)}")
    chosen = set(policies[name])
    return Policy(
        name=name,
        components=tuple(component for component in components if component in chosen),
        unquantized=tuple(component for component in components if component not in chosen),
        patterns=components,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such policy file") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path}: a mapping is needed")
    needed = {
        "format": codebook.FORMAT_NAME,
        "format_version": codebook.FORMAT_VERSION,
        "group_size": codebook.GROUP_SIZE,
        "bits_per_weight": codebook.BITS_PER_WEIGHT,
    }
    for key, value in needed.items():
        if document.get(key) != value:
            raise ConfigurationError(f"{path}: {key} is {document.get(key)!r}, this program writes {value!r}")
    return document


def _lists_of_names(path: Path, document: dict[str, Any], key: str) -> dict[str, tuple[str, ...]]:
    table = document.get(key)
    if not isinstance(table, dict) or not table:
        raise ConfigurationError(f"{path}: {key} is missing or empty")
    for name, entries in table.items():
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ConfigurationError(f"{path}: {key}.{name} must be a list of names")
    return {str(name): tuple(entries) for name, entries in table.items()}
