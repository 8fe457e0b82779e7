"""The whole run of `tune`: every target is searched, and its file written with where its figures come from."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from step128_kernels.tune.journal import Journal, OutputError, make_folder, write_json
from step128_kernels.tune.search import Choice, Judge, NothingServesError, Space, Target, candidates_of, search
from step128_kernels.tuned.names import VLLM_FUSED_MOE
from step128_kernels.tuned.schema import MEASURED, MODELLED, SCHEMA


@dataclass(frozen=True)
class Provenance:
    """How the configurations of a run come about, as its files say it."""

    source: str
    method: str
    date: str
    versions: Mapping[str, str]
    driver: str | None
    code: str
    """SHA-256 of the package's code; not in the files, but no journal goes on under another one."""


@dataclass
class Result:
    """What a run has done: files written, measured files that a model must not replace, and targets that failed.

    `warned` says of written files for which rows no candidate meets all gates.
    """

    written: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def tune(
    targets: Sequence[Target],
    space_of: Callable[[str], Space],
    judge: Judge,
    provenance: Provenance,
    output: Path,
    restart: bool,
    bar: Progress,
) -> Result:
    """Search every target and write its file; a target of which nothing serves does not stop the others.

    Journals stay until all targets are done, so that a run that was stopped redoes nothing of the first ones either.
    """
    result, journals = Result(), []
    for target in targets:
        path = target.path(output)
        if provenance.source == MODELLED and _is_measured(target, path):
            result.kept.append(str(path))
            continue
        candidates = candidates_of(space_of(target.kernel), target)
        make_folder(path.parent)
        task = bar.add_task(str(target), total=len(candidates))
        journal = Journal(path, _fingerprint(target, provenance), restart)
        try:
            chosen = search(candidates, judge, journal, lambda task=task: bar.advance(task))  # type: ignore[misc]
            _write(target, path, chosen, provenance)
            result.written.append(str(path))
            result.warned += _warnings(target, chosen)
            journals.append(journal)
        except NothingServesError as error:
            result.failed.append(str(error))
            journals.append(journal)
        finally:
            journal.close()
    for journal in journals:
        journal.remove()
    return result


def _fingerprint(target: Target, provenance: Provenance) -> dict[str, Any]:
    """All that outcomes depend on, and not the date."""
    known = asdict(provenance) | asdict(target)
    return {key: known[key] for key in known if key != "date"}


def _warnings(target: Target, chosen: Mapping[int, Choice]) -> list[str]:
    """One sentence for each gate that a chosen configuration misses."""
    rows_of: dict[str, list[str]] = {}
    for rows, choice in chosen.items():
        if choice.missed is not None:
            rows_of.setdefault(choice.missed, []).append(str(rows))
    return [
        f"{target}: at {', '.join(rows)} rows no candidate meets all gates; the fastest serves, with: {missed}."
        for missed, rows in rows_of.items()
    ]


def _write(target: Target, path: Path, chosen: Mapping[int, Choice], provenance: Provenance) -> None:
    document = {
        "schema": SCHEMA,
        "kernel": target.kernel,
        "shape": dict(target.shape),
        "device": target.device,
        "arch": target.arch,
        "source": provenance.source,
        "method": provenance.method,
        "date": provenance.date,
        "versions": dict(provenance.versions),
        "driver": provenance.driver,
    }
    if target.kernel != VLLM_FUSED_MOE:
        write_json(path, document | {"configs": {str(rows): dict(choice.config) for rows, choice in chosen.items()}})
        return
    # vLLM takes every key but triton_version for a number of rows, and every key below for an option of its kernel.
    write_json(_sidecar(path), document)
    configs = {
        str(rows): {key: value for key, value in choice.config.items() if key != "phase"}
        for rows, choice in chosen.items()
    }
    write_json(path, {"triton_version": provenance.versions.get("triton", "")} | configs)


def _sidecar(path: Path) -> Path:
    """Where the origin of one of vLLM's files is told, as it cannot be told in the file."""
    return path.with_name(f"{path.stem}.provenance.json")


def _is_measured(target: Target, path: Path) -> bool:
    told = _sidecar(path) if target.kernel == VLLM_FUSED_MOE else path
    if not told.exists():
        return False
    try:
        document = json.loads(told.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{told} is in the way and cannot be read ({error}). Move it away.") from error
    return isinstance(document, dict) and document.get("source") == MEASURED
