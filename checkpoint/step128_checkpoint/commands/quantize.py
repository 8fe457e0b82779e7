"""``step128-checkpoint quantize``: calibrates by itself where the method needs it and no calibration is given."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from step128_checkpoint.calibration.match import check_match
from step128_checkpoint.calibration.result import Calibration, open_calibration
from step128_checkpoint.commands.converting import check_output, finish, run_conversion
from step128_checkpoint.commands.options import add_conversion, add_kv_scales, positive
from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.kv_scaling import overflow_sentence, overflow_summary, plan_kv_scales
from step128_checkpoint.policy import load_policy
from step128_checkpoint.quantization import engine, search
from step128_checkpoint.quantization.hessians import Hessians
from step128_checkpoint.quantization.importance import open_importance
from step128_checkpoint.quantization.report import tensor_qualities, worst_tensors
from step128_checkpoint.quantize import METHODS, Weighting, plan_quantization
from step128_checkpoint.reader import Checkpoint, open_checkpoint

_NEED_CALIBRATION = ("importance", "gptq")


def add_parser(commands: Any) -> None:
    """Register the command with argparse's subparsers object."""
    parser = add_conversion(commands, "quantize", _run, "quantize a bf16, fp16 or fp32 checkpoint to NL4")
    parser.add_argument("--policy", help="what to quantize; the names are in configs/quantization/nl4.yaml")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="importance (default): scales searched for the smallest error, input channels weighted by calibration; "
        "gptq: error feedback besides (a calibration with --hessians); mse: unweighted, no calibration; absmax: the "
        "plain baseline",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, or torch's name of a GPU (default: %(default)s: a GPU if there)"
    )
    group = parser.add_argument_group("calibration (methods importance and gptq, and KV scales)")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="made by `calibrate`; without it, one is made in OUT.calibration/ first (kept, and used again)",
    )
    group.add_argument("--samples", type=positive, default=3072, metavar="N", help="of that one (default: %(default)s)")
    group.add_argument(
        "--tokens", type=positive, default=2048, metavar="N", help="of each of its samples (default: %(default)s)"
    )
    group.add_argument(
        "--importance", type=Path, metavar="FILE", help="safetensors: weight of each input channel, [K] or [E, K]"
    )
    add_kv_scales(parser)


def _run(arguments: argparse.Namespace) -> int:
    policy = load_policy(arguments.policy)
    checkpoint = open_checkpoint(arguments.input)
    check_output(arguments.input, arguments.output)
    plan_quantization(checkpoint, policy)  # finds what is wrong with the input before hours of calibration
    device = engine.device_name(arguments.device)
    calibration = _calibration(arguments, checkpoint)
    conversion = plan_quantization(
        checkpoint,
        policy,
        arguments.method,
        _weighting(arguments, checkpoint, calibration),
        arguments.max_shard_bytes,
        device,
        plan_kv_scales(checkpoint, calibration, arguments.kv_scales, arguments.k_headroom, arguments.v_headroom),
    )
    console = Console(stderr=True)
    if device == "cpu" and not search.available():
        console.print("numba is not installed: quantizing with numpy, many times slower.")
    report, summary = run_conversion(arguments, conversion, policy)
    if summary is None:
        return finish(arguments, report)
    rows = tensor_qualities(summary.notes, lambda name: policy.component_of(name, checkpoint.num_hidden_layers))
    report["largest_errors"] = [asdict(row) for row in rows[:10]]
    if calibration is None:
        return finish(arguments, report, worst_tensors(rows))
    report["kv_overflows"] = overflow_summary(calibration)
    return finish(arguments, report, worst_tensors(rows), overflow_sentence(calibration))


def _calibration(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Calibration | None:
    """The calibration that was asked for, or that the method needs; None if neither, or in a dry run."""
    if arguments.calibration:
        calibration = open_calibration(arguments.calibration)
        check_match(checkpoint, calibration)
        return calibration
    if arguments.method == "gptq":
        raise ConfigurationError("--method gptq needs --calibration DIR, made by `calibrate --hessians`")
    if arguments.method != "importance" or arguments.importance or arguments.dry_run:
        return None
    from step128_checkpoint.commands.automatic import calibrate_for  # torch: seconds to import, and not always there

    folder = arguments.output.with_name(arguments.output.name + ".calibration")
    return calibrate_for(checkpoint, folder, arguments.samples, arguments.tokens, arguments.device)


def _weighting(arguments: argparse.Namespace, checkpoint: Checkpoint, calibration: Calibration | None) -> Weighting:
    path = arguments.importance or (calibration.importance_path if calibration else None)
    if path is None:
        return Weighting()
    importance = open_importance(path, checkpoint)
    if arguments.method not in _NEED_CALIBRATION:
        return Weighting(importance)  # for the report alone: it does not decide the bytes
    hessians = Hessians(calibration.folder) if arguments.method == "gptq" and calibration else None
    return Weighting(importance, hessians, calibration.sha256 if calibration else importance.sha256)
