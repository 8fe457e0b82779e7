"""``step128-checkpoint prune``."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from step128_checkpoint.calibration.result import Calibration, open_calibration
from step128_checkpoint.commands.converting import check_output, finish, run_conversion
from step128_checkpoint.commands.options import add_conversion, add_kv_scales, non_negative, positive
from step128_checkpoint.dimensions import read_dimensions
from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.kv_scaling import plan_kv_scales
from step128_checkpoint.plain import require_plain
from step128_checkpoint.policy import load_policy
from step128_checkpoint.pruning.criteria import CRITERIA
from step128_checkpoint.pruning.decide import Pruning, decide, decided_by
from step128_checkpoint.pruning.prune import plan_pruning
from step128_checkpoint.pruning.report import REPORT_NAME, pruning_report, report_files
from step128_checkpoint.reader import Checkpoint, open_checkpoint


def add_parser(commands: Any) -> None:
    """Register the command with argparse's subparsers object."""
    parser = add_conversion(commands, "prune", _run, "drop the experts of each layer that matter least")
    parser.add_argument("--calibration", type=Path, metavar="CAL", help="made by `calibrate`; what it pruned is used")
    parser.add_argument("--keep", type=positive, metavar="N", help="experts that each layer keeps, such as 240")
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        help="reap (default): mean of router weight times output norm; ean: sum of output norms; frequency: tokens "
        "routed; random: for comparison, needs no calibration",
    )
    parser.add_argument("--seed", type=non_negative, metavar="N", help="of criterion random (default: 0)")
    parser.add_argument(
        "--protect", type=_expert, action="append", metavar="LAYER:EXPERT", help="keep this one too (may be repeated)"
    )
    parser.add_argument(
        "--super-expert-layers",
        type=_share,
        metavar="SHARE",
        help="keep the super-experts found in this first share of the layers (default: 1, all of them; 0: none)",
    )
    add_kv_scales(parser)


def _run(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.input)
    check_output(arguments.input, arguments.output)
    require_plain(checkpoint)
    calibration = open_calibration(arguments.calibration) if arguments.calibration else None
    pruning = _pruning(arguments, checkpoint, calibration)
    after_pruning = calibration if calibration and calibration.kept_experts is not None else None
    if calibration and not after_pruning and arguments.kv_scales == "calibrated":
        raise ConfigurationError(
            f"{calibration.folder} measured K and V of the unpruned model. --kv-scales calibrated needs a calibration "
            f"made with `calibrate --prune {pruning.keep}`."
        )
    kv_plan = plan_kv_scales(
        checkpoint,
        after_pruning,
        arguments.kv_scales,
        arguments.k_headroom,
        arguments.v_headroom,
    )
    conversion = plan_pruning(checkpoint, pruning, arguments.max_shard_bytes, kv_plan)
    name, experts = checkpoint.folder.resolve().name, read_dimensions(checkpoint).num_experts
    report = pruning_report(name, pruning, experts)
    if not arguments.dry_run:  # in the product's own folder: neither is ever there without the other
        files = report_files(name, pruning, experts)
        conversion = replace(conversion, extra_files={**conversion.extra_files, **files})
    document, summary = run_conversion(arguments, conversion, load_policy())
    document |= {key: report[key] for key in ("experts", "super_experts", "warnings", "mean_of_layers")}
    lines = [_sentence(pruning, report), *(f"[yellow]warning:[/yellow] {escape(text)}" for text in pruning.warnings)]
    if summary is not None:
        document["report"] = str(arguments.output / REPORT_NAME)
        lines.append(f"Report: {escape(document['report'])}")
    return finish(arguments, document, *lines)


def _pruning(arguments: argparse.Namespace, checkpoint: Checkpoint, calibration: Calibration | None) -> Pruning:
    if calibration and calibration.kept_experts is not None:
        _check_agrees(arguments, calibration)
        return decided_by(checkpoint, calibration)
    if arguments.keep is None:
        raise ConfigurationError("how many experts shall each layer keep? Say it: --keep N")
    return decide(
        checkpoint,
        calibration,
        arguments.keep,
        arguments.criterion or CRITERIA[0],
        arguments.seed or 0,
        arguments.protect or (),
        1.0 if arguments.super_expert_layers is None else arguments.super_expert_layers,
    )


def _check_agrees(arguments: argparse.Namespace, calibration: Calibration) -> None:
    """A calibration that pruned measured the layers without the dropped experts: its choice is the only right one."""
    decided = calibration.document["pruned"]
    for option in ("keep", "criterion", "seed"):
        given = getattr(arguments, option)
        if given is not None and given != decided.get(option):
            raise ConfigurationError(
                f"{calibration.folder} was made with --{option} {decided.get(option)}, not {given}: its measurements "
                f"hold for the experts that it kept. Leave --{option} out, or calibrate again."
            )
    for option, given in (("protect", arguments.protect), ("super-expert-layers", arguments.super_expert_layers)):
        if given is not None:
            raise ConfigurationError(
                f"{calibration.folder} has decided already which experts stay. Leave --{option} out, or prune by a "
                "calibration made without --prune."
            )


def _sentence(pruning: Pruning, report: dict[str, Any]) -> str:
    text = f"{report['experts']} -> {pruning.keep} experts in each of {len(pruning.kept)} layers"
    if mean := report["mean_of_layers"]:
        text += (
            f"; those dropped had {mean['dropped_token_share']:.1%} of a layer's routed tokens and "
            f"{mean['dropped_saliency_share']:.1%} of its saliency mass (mean of the layers)"
        )
    if pruning.super_experts:
        named = ", ".join(f"{layer}:{expert}" for layer, expert in sorted(pruning.super_experts))
        text += f". Super-experts kept (layer:expert): {named}"
    return text


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return value


def _expert(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER:EXPERT, such as 29:17")
    return int(match[1]), int(match[2])
