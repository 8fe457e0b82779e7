"""`step128 calibrate`: what a finished start of vLLM measured, beside the plan, kept for the next plan.

Arguments (argparse names): state_dir (Path or None), log and plan (Path or None, both or neither), metrics (URL, file,
or None), port (of the default state folder), json (bool).
"""

import argparse
import http.client
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from step128_launcher.api_key import find_api_key, find_metrics_token
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.planning.calibration import (
    Measurement,
    Settings,
    machine_key,
    model_fingerprint,
    parse_settings,
    save,
)
from step128_launcher.planning.plan import Plan
from step128_launcher.supervisor.comparison import ITEMS, Row, compare, planned_figures
from step128_launcher.supervisor.reality import Reality, read_reality
from step128_launcher.supervisor.state_files import PLAN

_VERSION = re.compile(r"\bversion (\d+\.\d+\S*)|LLM engine \(v(\S+?)\)")
_METRICS_SECONDS = 10.0
_FINISHED = "Application startup complete"  # the last line of a start (uvicorn)


@dataclass(frozen=True)
class Calibrated:
    """The result: what was compared, and what is worth keeping for `machine`."""

    machine: str
    rows: tuple[Row, ...]
    reality: Reality
    measurement: Measurement


def settings_of(plan: Plan, model: Path) -> Settings:
    """Return the settings a measurement of this plan belongs to; `model` is the checkpoint's folder."""
    return Settings(
        model=model_fingerprint(model),
        tensor_parallel_size=plan.tensor_parallel_size,
        num_speculative_tokens=plan.num_speculative_tokens,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        vision=plan.vision,
        attention_backend=plan.attention_backend,
        kv_cache_dtype=plan.kv_cache_dtype,
        enforce_eager=plan.enforce_eager,
        dtype=plan.dtype,
        enable_expert_parallel=plan.enable_expert_parallel,
    )


def calibration_document(plan: Plan, model: Path, hardware: Hardware) -> dict[str, Any]:
    """Return what the plan document holds under "calibration", so that a log can be read without the machine."""
    return {
        "machine": machine_key(hardware),
        "settings": asdict(settings_of(plan, model)),
        "planned": planned_figures(plan),
    }


def calibrate(document: Mapping[str, Any], reality: Reality, version: str, source: str, date: str) -> Calibrated:
    """Compare a plan document with what was measured; pure.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: the document has no usable "calibration".

    """
    calibration = document["calibration"]
    known = {item.name for item in ITEMS}
    figures = calibration["planned"]
    if not isinstance(figures, dict):
        raise TypeError(f"planned: {figures!r}")
    planned = {str(name): float(value) for name, value in figures.items() if name in known}
    measurement = Measurement(
        settings=parse_settings(calibration["settings"]),
        weights_bytes=reality.weights_bytes,
        activation_bytes=reality.activation_bytes,
        graph_bytes=reality.graph_bytes,
        non_torch_bytes=reality.non_torch_bytes,
        date=date,
        vllm_version=version,
        source=source,
    )
    return Calibrated(str(calibration["machine"]), compare(planned, reality), reality, measurement)


def run_calibrate(options: argparse.Namespace, state_dir: Path, folder: Path | None = None) -> ExitCode:
    """Read, print and store; `state_dir` is the one that --state-dir or --port name.

    Raises:
        LauncherError: 66, if a file is not there; 65, if it holds no plan of this launcher or no finished start; 5, 73.

    """
    log = options.log or state_dir / "vllm.log"
    plan = options.plan or state_dir / PLAN
    document = _read_plan(plan)
    text = _read(log)
    metrics = _read_metrics(options.metrics, state_dir) if options.metrics else ""
    reality = read_reality(text.splitlines(), metrics)
    # The launcher kept what the start reported; its log may have been cut since. A log that is named counts itself.
    if options.log is None and isinstance(document.get("reality"), dict):
        reality = _merge(document["reality"], reality)
    version = next((one or two for one, two in _VERSION.findall(text)), "unknown")
    try:
        result = calibrate(document, reality, version, str(log), datetime.now(UTC).date().isoformat())
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        message = f"{plan} holds no plan of this version of the launcher: {error!r}."
        raise LauncherError(ExitCode.BAD_CHECKPOINT, message, "Start the server with `step128 serve` again.") from error
    # A start that failed reports some figures too, and they would replace all of an earlier one.
    finished = isinstance(document.get("reality"), dict) if options.log is None else _FINISHED in text
    if not finished or reality == Reality():
        raise LauncherError(
            ExitCode.BAD_CHECKPOINT,
            f"{log} reports no finished start of vLLM, so there is nothing to calibrate with.",
            "Wait until `step128 status` says ready and calibrate again, or name the whole log of a start that was "
            f'ready (it says "{_FINISHED}") and its plan: --log FILE --plan FILE.',
        )
    stored = None if result.measurement.is_empty else save(result.measurement, result.machine, folder)
    _print(result, stored, options.json)
    return ExitCode.OK


def _print(result: Calibrated, stored: Path | None, as_json: bool) -> None:
    if as_json:
        rows = [
            {"item": row.item.name, "planned": row.planned, "measured": row.measured, "difference": row.difference}
            for row in result.rows
        ]
        reality, kept = asdict(result.reality), str(stored) if stored else None
        document = {"schema": 1, "machine": result.machine, "rows": rows, "reality": reality, "stored": kept}
        print(json.dumps(document, indent=1))
        return
    from step128_launcher import consoles  # rich, and the table: `plan` needs neither of this module
    from step128_launcher.supervisor.progress import comparison_table

    console = consoles.stdout()
    console.print(comparison_table(result.rows))
    text = (
        f"Stored in {stored}: the next plan with these settings uses the measured sizes."
        if stored
        else "Nothing stored: this backend reports no weights, activations, graphs or runtime memory."
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _merge(kept: Mapping[str, Any], read: Reality) -> Reality:
    """Return the kept figures, each one that is missing taken from what was read now."""
    values = asdict(read)
    numbers = {name: kept[name] for name in values if isinstance(kept.get(name), int | float)}
    return Reality(**{**values, **numbers})


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise LauncherError(ExitCode.BAD_CHECKPOINT, f"{path} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise LauncherError(ExitCode.BAD_CHECKPOINT, f"{path} holds no plan.")
    return document


def _read_metrics(source: str, state_dir: Path) -> str:
    """Return the text of /metrics from a URL or a file."""
    if not source.startswith(("http://", "https://")):
        return _read(Path(source))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(source)
        key = _metrics_key(urllib.parse.urlsplit(source).hostname, state_dir)
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with opener.open(request, timeout=_METRICS_SECONDS) as response:
            text: str = response.read().decode("utf-8", errors="replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise LauncherError(ExitCode.INPUT_NOT_FOUND, f"{source} cannot be read: {error!r}.") from error
    return text


def _metrics_key(host: str | None, state_dir: Path) -> str:
    """Return the metrics token, or for a server on this machine the API key; empty if there is none."""
    token = find_metrics_token(None, os.environ)
    if token is not None:
        return token.value
    if host not in ("127.0.0.1", "localhost", "::1"):
        return ""
    return find_api_key(None, os.environ, state_dir, generate=False).value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        code = ExitCode.PERMISSION if isinstance(error, PermissionError) else ExitCode.INPUT_NOT_FOUND
        raise LauncherError(code, f"{path} cannot be read: {error.strerror}.") from error
