"""``mtp-depth``: results of ``acceptance`` at several MTP depths, and which depth pays."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from step128_evals.acceptance.advice import advise
from step128_evals.errors import CannotWriteError
from step128_evals.options import Parsers, Result, add_command
from step128_evals.runs import read_run
from step128_evals.tables import columns, with_interval


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    text = "the MTP depth that pays, from results of `acceptance` at several depths of the same model"
    parser = add_command(commands, "mtp-depth", text, _run)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.jsonl", help="one for each depth, 0 included")
    parser.add_argument("--picture", type=_picture, metavar="FILE.svg", help="draw speed by depth (.svg, .png, .pdf)")


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise argparse.ArgumentTypeError("must end in .svg, .png or .pdf")
    return path


def _run(parsed: argparse.Namespace) -> Result:
    advice = advise([read_run(path) for path in parsed.results])
    if parsed.picture:
        from step128_evals.acceptance.pictures import draw_depths

        try:
            parsed.picture.parent.mkdir(parents=True, exist_ok=True)
            draw_depths(advice, parsed.picture)
        except OSError as error:
            raise CannotWriteError(f"{error.filename or parsed.picture}: {error.strerror}") from error
    if not parsed.json:
        print(describe_advice(advice))
    return advice, 0


def describe_advice(advice: dict[str, Any]) -> str:
    """For a terminal: speeds, ratios and the advice of each domain."""
    depths = advice["measured_depths"]
    groups = [*advice["domains"].items(), ("all", advice["all"])]
    if len(groups) == 2:
        groups = groups[:1]
    speeds = [["decoding, tokens/s", "prompts", *(f"MTP {depth}" for depth in depths)]]
    ratios = [[f"times depth {depths[0]}", *(f"MTP {depth}" for depth in depths[1:])]]
    for name, group in groups:
        rows = [group["depths"].get(str(depth), {}) for depth in depths]
        cells = [
            with_interval(row.get("decode_tokens_per_second"), row.get("decode_tokens_per_second_interval"), 1)
            for row in rows
        ]
        speeds.append([name, str(group["prompts"]), *cells])
        ratios.append([name, *(with_interval(row.get("ratio"), row.get("ratio_interval"), 2) for row in rows[1:])])
    lines = [f"Model {advice['model']}", "", columns(speeds), "", columns(ratios), ""]
    for name, group in groups:
        chosen = "no advice" if group["advice"] is None else f"depth {group['advice']}"
        lines.append(f"{name}: {chosen}: {group['reason']}")
    lines += ["", "Ratios are geometric means over the same prompts, brackets 95 % bootstrap intervals over prompts."]
    lines.append("One request at a time: under load a verified draft costs more, so a smaller depth may pay there.")
    return "\n".join([*lines, *filter(None, [advice["how_to_measure"]])])
