"""What a checkpoint says is quantized, checked against `configs/quantization/nl4.yaml`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.model.model_config import ModelConfig

# The NL4 codebook, version 1 (kernels/README.md). It is stated again here because the launcher imports no other room;
# a checkpoint with other values would be decoded into other weights, so it is refused.
CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Format:
    """`nl4.yaml`: the format's figures, component name -> patterns of tensor names, policy name -> components."""

    name: str
    version: int
    group_size: int
    bits_per_weight: float
    components: dict[str, tuple[str, ...]]
    policies: dict[str, tuple[str, ...]]
    default_policy: str

    def tensor_components(self, config: ModelConfig) -> dict[str, str]:
        """Return tensor name -> component for every tensor a policy may quantize, as if it were not quantized."""
        ranges = {"main": config.main_layers, "mtp": config.mtp_layer_indices, "vision": range(config.vision.layers)}
        return {
            name: component
            for component, patterns in self.components.items()
            for pattern in patterns
            for name in _expand(pattern, ranges)
        }


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's `quantization_config`, checked.

    `policy` is the name of one of ours, or says what another tool's format looks like. `group_size` input columns
    share a scale, so that ranks may cut between groups only; None: a scale for each row or weight.
    """

    method: str
    policy: str
    components: frozenset[str]
    group_size: int | None


def read_format(configs_dir: Path) -> Format:
    """Read `configs_dir`/quantization/nl4.yaml.

    Raises:
        LauncherError: 78, if the file is missing, no YAML, or lacks a key.

    """
    path = configs_dir / "quantization" / "nl4.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        form = Format(
            name=str(document["format"]),
            version=int(document["format_version"]),
            group_size=int(document["group_size"]),
            bits_per_weight=float(document["bits_per_weight"]),
            components={str(name): tuple(map(str, patterns)) for name, patterns in document["components"].items()},
            policies={str(name): tuple(map(str, parts)) for name, parts in document["policies"].items()},
            default_policy=str(document["default_policy"]),
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION, f"{path} is not the policy file this release knows: {error!r}."
        ) from error
    unknown = sorted({part for parts in form.policies.values() for part in parts} - form.components.keys())
    if unknown or form.default_policy not in form.policies:
        what = f"the component {unknown[0]!r}" if unknown else f"the default policy {form.default_policy!r}"
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"{path} does not define {what}, which it uses.")
    return form


def read_quantization(path: Path, section: dict[str, Any] | None, form: Format) -> Quantization | None:
    """Check a `quantization_config` (of the file `path`); None stands for an unquantized checkpoint.

    Raises:
        CheckpointError: if it is of another method, version, group size or codebook, or names unknown components.

    """
    if section is None:
        return None
    wanted: dict[str, object] = {
        "quant_method": form.name,
        "format_version": form.version,
        "group_size": form.group_size,
        "bits_per_weight": form.bits_per_weight,
        "codebook": list(CODEBOOK),
        "scale_dtype": "float16",
    }
    for key, value in wanted.items():
        if section.get(key) != value:
            raise CheckpointError(
                f"{path}: quantization_config.{key} is {section.get(key)!r}; this release reads {value!r}.",
                "Quantize it again with this release's step128-checkpoint, or serve it with one that matches.",
            )
    quantized = section.get("quantized_components")
    if not isinstance(quantized, list) or not quantized:
        raise CheckpointError(f"{path}: quantization_config.quantized_components must be a list with entries.")
    unknown = sorted(set(map(str, quantized)) - set(form.components))
    if unknown:
        raise CheckpointError(
            f"{path}: quantization_config.quantized_components names {', '.join(unknown)}; known are "
            + ", ".join(form.components)
            + "."
        )
    return Quantization(form.name, str(section.get("policy") or "unnamed"), frozenset(quantized), form.group_size)


def _expand(pattern: str, ranges: dict[str, range]) -> Iterator[str]:
    """Yield the pattern once for each layer of the range its placeholder names."""
    for placeholder, layers in ranges.items():
        if "{" + placeholder + "}" in pattern:
            for layer in layers:
                yield pattern.replace("{" + placeholder + "}", str(layer))
            return
    yield pattern
