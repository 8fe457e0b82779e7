"""After the start: did what was planned take effect? The plan and the checkpoint against what vLLM itself reports.

vLLM only logs a plugin that failed to load, uses 1.0 for KV scales it could not place, and serves without a draft if
none is configured. So nothing is taken on trust here.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from step128_launcher.model.footprint import KvScale, ModelFootprint
from step128_launcher.planning.plan import Plan
from step128_launcher.planning.reserved import OUR_ATTENTION_BACKEND
from step128_launcher.supervisor.load_report import DRAFT, TARGET, LoadReport

_SCALE_TOLERANCE = 1e-6
CACHE_CONFIG_METRIC = "vllm:cache_config_info"
_ACCEPTED_METRIC = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_UNSCALED = KvScale(1.0, 1.0)  # in effect in vLLM for a layer whose scales the checkpoint lacks


class Outcome(StrEnum):
    """Of one check; only FAIL stops the server."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Observation:
    """What the running server shows: load reports, /metrics as text and the first entry of /v1/models."""

    reports: list[LoadReport]
    report_problems: list[str]
    metrics: str
    model: dict[str, Any]


def verify(plan: Plan, footprint: ModelFootprint, served_model_name: str, seen: Observation) -> list[Check]:
    """Compare; pure. The checks come in a fixed order, those that do not apply left out."""
    targets = [report for report in seen.reports if report.role == TARGET]
    drafts = [report for report in seen.reports if report.role == DRAFT]
    checks = [
        _plugin_loaded(plan, targets, seen.report_problems),
        _mtp(plan, drafts, seen),
        _plugin_version(seen.reports),
        _quantization(footprint, seen.reports),
        _weight_path(plan, footprint, seen.reports),
        *_attention(plan, seen.reports),
        _components(footprint, targets, drafts, plan.num_speculative_tokens > 0),
    ]
    if plan.kv_cache_dtype == "fp8" and footprint.kv_scales:
        trunk = range(footprint.config.num_hidden_layers)
        checks.append(_kv_scales("kv_scales", footprint, targets, trunk))
        if plan.num_speculative_tokens:
            mtp = range(footprint.config.num_hidden_layers, len(footprint.attention_layers))
            checks.append(_kv_scales("kv_scales_mtp", footprint, drafts, mtp))
    checks += _cache(plan, seen.metrics)
    checks += _model(plan, served_model_name, seen.model)
    return checks


def failed(checks: Iterable[Check]) -> list[Check]:
    """Return the checks that must stop the server."""
    return [check for check in checks if check.outcome is Outcome.FAIL]


def _compare(name: str, found: object, expected: object, otherwise: Outcome = Outcome.FAIL) -> Check:
    if found == expected:
        return Check(name, Outcome.PASS, f"{found}")
    return Check(name, otherwise, f"found {found}, expected {expected}")


def _plugin_loaded(plan: Plan, targets: list[LoadReport], problems: list[str]) -> Check:
    ranks = list(range(plan.tensor_parallel_size))
    found = [report.rank for report in targets]
    if found == ranks:
        return Check("plugin_loaded", Outcome.PASS, f"loaded on ranks {found}")
    detail = f"load reports of ranks {found}, expected {ranks}{_unreadable(problems)}"
    return Check("plugin_loaded", Outcome.FAIL, detail)


def _unreadable(problems: list[str]) -> str:
    return f" (unreadable: {'; '.join(problems)})" if problems else ""


def _mtp(plan: Plan, drafts: list[LoadReport], seen: Observation) -> Check:
    """Compare the draft's ranks, and the depth: vLLM makes one counter for each position it drafts, at its start."""
    planned = plan.num_speculative_tokens
    wanted = list(range(plan.tensor_parallel_size)) if planned else []
    found = [report.rank for report in drafts]
    depth = len({sample.labels.get("position") for sample in samples(seen.metrics, _ACCEPTED_METRIC)})
    if found == wanted and depth == planned:
        detail = f"depth {depth}, draft loaded on ranks {found}" if planned else "off, as planned"
        return Check("mtp", Outcome.PASS, detail)
    detail = f"depth {planned} planned, {depth} in effect, draft load reports of ranks {found}"
    return Check("mtp", Outcome.FAIL, detail + _unreadable(seen.report_problems))


def _plugin_version(reports: list[LoadReport]) -> Check:
    try:
        expected = version("step128")
    except PackageNotFoundError:
        return Check("plugin_version", Outcome.WARN, "this launcher is not installed as a package")
    return _compare("plugin_version", _one(report.plugin_version for report in reports), expected)


def _one(values: Iterable[object]) -> object:
    """Return the value all reports agree on, or the sorted list of those they do not agree on."""
    distinct = sorted(set(values), key=str)
    return distinct[0] if len(distinct) == 1 else distinct


def _quantization(footprint: ModelFootprint, reports: list[LoadReport]) -> Check:
    expected = footprint.quantization.method if footprint.quantization else None
    return _compare("quantization", _one(report.quant_method for report in reports), expected)


def _weight_path(plan: Plan, footprint: ModelFootprint, reports: list[LoadReport]) -> Check:
    """On a GPU our kernels must compute with every quantized weight, which they can only in their own order."""
    on_cpu = plan.device == "cpu"
    if not reports:
        return Check("weight_path", Outcome.FAIL, "no load report")
    paths: set[str] = set()
    for report in reports:
        draft = report.role == DRAFT
        quantized = bool(footprint.quantization) and any(
            part.quantized and part.draft == draft for part in footprint.components
        )
        wanted = (("torch" if on_cpu else "triton"), "kernel") if quantized else (None, None)
        found = (report.weight_path, report.weight_order)
        if found[0] != wanted[0] or (found != wanted and not on_cpu):
            where = f"{report.role} rank {report.rank}"
            detail = f"{where}: path {found[0]}, order {found[1]}; expected path {wanted[0]}"
            detail += "" if on_cpu else f", order {wanted[1]}. {_meaning(quantized)}"
            return Check("weight_path", Outcome.FAIL, detail)
        paths.add(str(wanted[0]))
    return Check("weight_path", Outcome.PASS, ", ".join(sorted(paths)))


def _attention(plan: Plan, reports: list[LoadReport]) -> list[Check]:
    """The backend that the plan names must serve every attention layer, and ours with its kernels."""
    wanted = plan.attention_backend
    if wanted is None:
        return []
    path = "triton" if wanted == OUR_ATTENTION_BACKEND else None
    for report in reports:
        found = (report.attention_backend, report.attention_path)
        if found != (wanted, path):
            detail = f"{report.role} rank {report.rank}: {found[0]}, path {found[1]}; expected {wanted}"
            detail += f", path {path}" if path else ""
            return [Check("attention", Outcome.FAIL, f"{detail}. {_attention_meaning(found[0], wanted)}")]
    return [Check("attention", Outcome.PASS if reports else Outcome.FAIL, wanted if reports else "no load report")]


def _attention_meaning(found: str | None, wanted: str) -> str:
    if found is None:
        return (
            "The load report does not say which backend serves: it is of an older plugin, or found no attention layer. "
            "Install launcher and plugin of one release"
        )
    if found != wanted:
        return "vLLM chose another backend than it was told to"
    return "The slow torch reference computes on the GPU"


def _meaning(quantized: bool) -> str:
    if not quantized:
        return "A model without quantized weights in the checkpoint was loaded with some"
    return (
        "Quantized weights were not all reordered for our kernels: the slow torch reference computes on the GPU and "
        "unpacks whole weights into memory that the plan does not count. The server's log says how loading went"
    )


def _components(
    footprint: ModelFootprint, targets: list[LoadReport], drafts: list[LoadReport], drafting: bool
) -> Check:
    """Every quantized component must have quantized modules in its role, and no other component may have any."""
    problems: list[str] = []
    counts: list[str] = []
    roles: list[tuple[str, list[LoadReport], bool]] = [(TARGET, targets, False)]
    if drafting:
        roles.append((DRAFT, drafts, True))
    for role, reports, draft in roles:
        expected = {part.name for part in footprint.components if part.quantized and part.draft == draft}
        for report in reports:
            found = {name for name, count in report.quantized_modules.items() if count}
            where = f"{role} rank {report.rank}"
            problems += [f"{name} is not quantized on {where}" for name in sorted(expected - found)]
            problems += [f"{name} is quantized on {where}, not in the checkpoint" for name in sorted(found - expected)]
        if reports:
            counts += [f"{name} {reports[0].quantized_modules.get(name, 0)}" for name in sorted(expected)]
    if problems:
        return Check("quantized_components", Outcome.FAIL, "; ".join(problems))
    return Check("quantized_components", Outcome.PASS, ", ".join(counts) or "none, as in the checkpoint")


def _kv_scales(name: str, footprint: ModelFootprint, reports: list[LoadReport], layers: range) -> Check:
    """Each rank must use the checkpoint's scale in each of `layers`, or 1.0 where the checkpoint has none."""
    scales = footprint.kv_scales or {}
    for report in reports:
        for layer in layers:
            expected, found = scales.get(layer, _UNSCALED), report.kv_scales.get(layer)
            where = f"layer {layer}, {report.role} rank {report.rank}"
            if found is None:
                return Check(name, Outcome.FAIL, f"{where}: no scale in effect")
            if not _close(found[0], expected.k) or not _close(found[1], expected.v):
                source = "stored" if layer in scales else "expected without stored scales"
                detail = f"{where}: k {found[0]:g} v {found[1]:g} in effect, k {expected.k:g} v {expected.v:g} {source}"
                return Check(name, Outcome.FAIL, detail)
    if not reports:
        return Check(name, Outcome.FAIL, "no load report")
    stored = all(layer in scales for layer in layers)
    how = "as in the checkpoint" if stored else "at 1.0: the checkpoint has none for them"
    return Check(name, Outcome.PASS, f"{len(layers)} layers {how}")


def _close(found: float, expected: float) -> bool:
    # 1.0 is exact in every float type; stored scales may have been rounded on their way through text.
    return found == expected or (expected != 1.0 and math.isclose(found, expected, rel_tol=_SCALE_TOLERANCE))


def _cache(plan: Plan, metrics: str) -> list[Check]:
    """Compare vLLM's cache_config_info; sizes that differ are a wrong prediction, not a wrong server."""
    labels = cache_config(metrics)
    if labels is None:
        return [Check("cache_dtype", Outcome.FAIL, f"/metrics has no {CACHE_CONFIG_METRIC}")]
    checks = [_compare("cache_dtype", labels.get("cache_dtype"), plan.kv_cache_dtype)]
    figures: list[tuple[str, Callable[[str], object], object]] = [
        ("num_gpu_blocks", int, plan.prediction.num_gpu_blocks),
        ("kv_cache_size_tokens", int, plan.prediction.kv_cache_size_tokens),
    ]
    for label, convert, expected in figures:
        try:
            found: object = convert(labels[label])
        except (KeyError, ValueError):
            found = labels.get(label)
        checks.append(_compare(label, found, expected, Outcome.WARN))
    return checks


def cache_config(metrics: str) -> dict[str, str] | None:
    """Return the labels of vLLM's cache_config_info metric, or None."""
    return next((dict(sample.labels) for sample in samples(metrics, CACHE_CONFIG_METRIC)), None)


def samples(metrics: str, name: str) -> list[Sample]:
    """Return all samples of one name in a /metrics text; none if the text cannot be parsed."""
    try:
        families = list(text_string_to_metric_families(metrics))
    except ValueError:
        return []
    return [sample for family in families for sample in family.samples if sample.name == name]


def _model(plan: Plan, served_model_name: str, model: dict[str, Any]) -> list[Check]:
    return [
        _compare("model_name", model.get("id"), served_model_name),
        _compare("max_model_len", model.get("max_model_len"), plan.max_model_len),
    ]
