"""``step128-checkpoint quantize``: calibrates by itself where the method needs it and no calibration is given."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from step128_checkpoint.calibration.building.mixture import DEFAULT_SAMPLES, DEFAULT_TOKENS_PER_SAMPLE
from step128_checkpoint.calibration.match import check_match
from step128_checkpoint.calibration.result import Calibration, open_calibration
from step128_checkpoint.commands.converting import check_output, check_room, finish, run_conversion
from step128_checkpoint.commands.options import add_conversion, add_kv_scales, positive
from step128_checkpoint.dimensions import read_dimensions
from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.files import size_text
from step128_checkpoint.kv_scaling import overflow_sentence, plan_kv_scales
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
    group.add_argument("--samples", type=positive, metavar="N", help=f"of that one (default: {DEFAULT_SAMPLES})")
    group.add_argument(
        "--tokens", type=positive, metavar="N", help=f"of each of its samples (default: {DEFAULT_TOKENS_PER_SAMPLE})"
    )
    group.add_argument(
        "--importance", type=Path, metavar="FILE", help="safetensors: weight of each input channel, [K] or [E, K]"
    )
    add_kv_scales(parser)


def _run(arguments: argparse.Namespace) -> int:
    policy = load_policy(arguments.policy)
    checkpoint = open_checkpoint(arguments.input)
    check_output(arguments.input, arguments.output)
    _check_options(arguments)
    engine.load(arguments.method == "gptq")
    # A plan without weighting finds what is wrong with the input, the disk or the memory before hours of calibration.
    check_room(plan_quantization(checkpoint, policy), arguments.output, arguments.max_memory)
    console = Console(stderr=True)
    device = _device(arguments, console)
    calibration = _calibration(arguments, checkpoint, console)
    kv_plan = plan_kv_scales(
        checkpoint, calibration, arguments.kv_scales, arguments.k_headroom, arguments.v_headroom, input_first=True
    )
    conversion = plan_quantization(
        checkpoint,
        policy,
        arguments.method,
        _weighting(arguments, checkpoint, calibration),
        arguments.max_shard_bytes,
        device,
        kv_plan,
    )
    report, summary = run_conversion(arguments, conversion, policy)
    if summary is None:
        return finish(arguments, report)
    rows = tensor_qualities(summary.notes, lambda name: policy.component_of(name, checkpoint.num_hidden_layers))
    report["largest_errors"] = [asdict(row) for row in rows[:10]]
    report["kv_scales_report"] = dict(kv_plan.report)
    if calibration is None or kv_plan.source != "calibrated":
        return finish(arguments, report, worst_tensors(rows))
    return finish(arguments, report, worst_tensors(rows), overflow_sentence(calibration))


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing, or that contradict each other."""
    calibrates = arguments.method == "importance" and not (arguments.calibration or arguments.importance)
    if (arguments.samples or arguments.tokens) and not calibrates:
        raise ConfigurationError(
            "--samples and --tokens are of a calibration made on the way, and none is: the method needs none, or one "
            "is given. Leave them out."
        )
    if arguments.method == "gptq" and arguments.importance:
        raise ConfigurationError("--importance cannot be used with --method gptq: its Hessians have their own diagonal")
    if arguments.method == "gptq" and not arguments.calibration:
        raise ConfigurationError("--method gptq needs --calibration DIR, made by `calibrate --hessians`")


def _device(arguments: argparse.Namespace, console: Console) -> str:
    device = engine.device_name(arguments.device)
    if device != "cpu" and arguments.method == "gptq":
        console.print("GPTQ runs on the CPU: its error feedback goes column by column.")
        return "cpu"
    if device == "cpu" and not search.available():
        console.print("numba is not installed: quantizing with numpy, many times slower.")
    return device


def _calibration(arguments: argparse.Namespace, checkpoint: Checkpoint, console: Console) -> Calibration | None:
    """The calibration that was asked for, or that the method needs; None if neither, or in a dry run."""
    if arguments.calibration:
        calibration = open_calibration(arguments.calibration)
        check_match(checkpoint, calibration)
        return calibration
    if arguments.method != "importance" or arguments.importance:
        return None
    folder = arguments.output.with_name(arguments.output.name + ".calibration")
    samples, tokens = arguments.samples or DEFAULT_SAMPLES, arguments.tokens or DEFAULT_TOKENS_PER_SAMPLE
    if arguments.dry_run:
        states_bytes = 2 * samples * tokens * read_dimensions(checkpoint).hidden_size * 2
        console.print(
            f"Before that, a calibration of {samples} samples of {tokens} tokens in {escape(str(folder))}/: about "
            f"{size_text(states_bytes)} of disk for hidden states, gone at its end; memory for one layer and a batch "
            "(`calibrate --dry-run`). If the input has no KV scales, the calibrated ones come with it."
        )
        return None
    from step128_checkpoint.commands.automatic import calibrate_for

    return calibrate_for(checkpoint, folder, samples, tokens, arguments.device)


def _weighting(arguments: argparse.Namespace, checkpoint: Checkpoint, calibration: Calibration | None) -> Weighting:
    path = arguments.importance or (calibration.importance_path if calibration else None)
    if path is None:
        return Weighting()
    importance = open_importance(path, checkpoint)
    if arguments.method not in _NEED_CALIBRATION:
        return Weighting(importance)  # for the report alone: it does not decide the bytes
    if arguments.importance or calibration is None:
        return Weighting(importance, None, importance.sha256)
    return Weighting(importance, Hessians(calibration) if arguments.method == "gptq" else None, calibration.sha256)
