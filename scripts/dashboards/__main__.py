"""Write Grafana's dashboards: `python scripts/dashboards`; with --check, say which files differ and write nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpus
import memory
import overview
import runbook
import speculation
import traffic

FOLDER = Path(__file__).parents[2] / "configs/grafana/dashboards"
DASHBOARDS = {
    "overview": overview,
    "speculation": speculation,
    "memory": memory,
    "gpus": gpus,
    "requests": traffic,
    "runbook": runbook,
}


def main(arguments: list[str]) -> int:
    """Return 0, or 1 where --check found a file that differs."""
    texts = {
        FOLDER / f"{name}.json": json.dumps(module.build(), indent=1, ensure_ascii=False) + "\n"
        for name, module in DASHBOARDS.items()
    }
    if arguments == ["--check"]:
        there = {path: path.read_text() for path in FOLDER.glob("*.json")}
        differ = sorted(path.name for path in texts.keys() | there.keys() if texts.get(path) != there.get(path))
        print(f"differ from `python scripts/dashboards`: {', '.join(differ)}" if differ else "as generated")
        return 1 if differ else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, content in texts.items():
        new = path.with_suffix(".new")
        new.write_text(content)
        new.replace(path)
    print(f"{len(texts)} dashboards in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
