"""``tools``: are functions called when, and only when, they should be, with the right arguments."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from step128_evals.client import Client
from step128_evals.corpus import prose
from step128_evals.errors import BadInputError
from step128_evals.evaluation import Evaluation, run_evaluation
from step128_evals.harness import Task
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count, counts
from step128_evals.probe import Endpoint, probe_endpoint
from step128_evals.reasoning.switch import Switch, find_switch
from step128_evals.tokens import find_counter
from step128_evals.tools.conversation import Asking, Variant
from step128_evals.tools.filler import Filler, build_filler
from step128_evals.tools.offer import require_tools_in_prompt
from step128_evals.tools.scenarios import Scenario, choose_scenarios, load_scenarios

_PAIRS = (("streamed", "whole"), ("thinking", "plain"))
_NEEDED = ("chat", "streaming", "tools", "tokenize", "reasoning_effort")
_EFFORTS = ("low", "medium", "high")


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_endpoint_command(commands, "tools", "multi-turn tool calling, failures counted by kind", _run)
    add_results(parser, concurrency=4)
    parser.add_argument(
        "--scenarios", metavar="NAMES", help="kinds, ids or patterns (text-*), with commas between; default: all"
    )
    parser.add_argument(
        "--variants",
        type=_variants,
        default=list(product((True, False), repeat=2)),
        metavar="NAMES",
        help="some of streamed,whole,thinking,plain; default: all. Naming one of a pair leaves the other out",
    )
    parser.add_argument(
        "--depth-tokens", type=counts, default=[0, 32768], metavar="N,...", help="of earlier turns; default: 0,32k"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=4096, metavar="N", help="of an answer with its reasoning (%(default)s)"
    )
    parser.add_argument(
        "--reasoning-effort", choices=_EFFORTS, help="of the variants that think; default: the server's own"
    )
    parser.add_argument("--list", action="store_true", help="print the scenarios, ask nothing")


def _variants(text: str) -> list[tuple[bool, bool]]:
    """(streamed, thinking) of each variant."""
    names = text.split(",")
    unknown = set(names) - {name for names_of_pair in _PAIRS for name in names_of_pair}
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    streams, thoughts = ([name == first for name in (first, second) if name in names] for first, second in _PAIRS)
    return list(product(streams or (True, False), thoughts or (True, False)))


async def _run(parsed: argparse.Namespace, client: Client) -> Result:
    scenarios = choose_scenarios(load_scenarios(), parsed.scenarios)
    if parsed.list:
        return _listing(scenarios, parsed.json)
    endpoint = await probe_endpoint(client, parsed.model, _NEEDED)
    endpoint.require("chat", "tools")
    await require_tools_in_prompt(client, endpoint.model, list(scenarios[0].tools))
    variants = [
        Variant(stream, thinking, depth)
        for depth, (stream, thinking) in product(sorted(set(parsed.depth_tokens)), parsed.variants)
    ]
    if any(variant.stream for variant in variants):
        endpoint.require("streaming")
    asking = await _prepare(parsed, client, endpoint)
    total = f"{len(scenarios)} scenarios x {len(variants)} variants = {len(scenarios) * len(variants)} items"
    print(f"tools: {total} ({', '.join(variant.name for variant in variants)})", file=sys.stderr)
    # Variant after variant: a server keeps the filler's prefix in its cache.
    tasks = [
        Task(id, partial(asking.hold, id, scenario, variant))
        for variant, scenario in product(variants, scenarios)
        for id in (f"{scenario.id}.{variant.name}",)
    ]
    settings = _settings(asking, scenarios, variants) | {"reasoning_effort": parsed.reasoning_effort}
    return await run_evaluation(parsed, endpoint, Evaluation("tools", "conversations", settings, tasks))


def _listing(scenarios: list[Scenario], as_json: bool) -> Result:
    rows = {
        scenario.id: next((step.user for step in scenario.steps if step.user), "").splitlines()[0]
        for scenario in scenarios
    }
    if not as_json:
        for id, user in rows.items():
            print(f"{id:28} {user[:90]}")
    return {"scenarios": rows}, 0


async def _prepare(parsed: argparse.Namespace, client: Client, endpoint: Endpoint) -> Asking:
    """Find the switch of thinking, and build the filler of each depth that the context has room for."""
    if parsed.reasoning_effort:
        endpoint.require("reasoning_effort")
    switch = await find_switch(client, endpoint.model, effort=parsed.reasoning_effort)
    if parsed.reasoning_effort:
        switch = _with_effort(switch, parsed.reasoning_effort)
    asking = Asking(client, endpoint.model, endpoint.max_context_tokens, parsed.max_tokens, switch, {})
    if reason := asking.too_deep(0):
        raise BadInputError(f"{reason}: pass a smaller --max-tokens")
    depths = [depth for depth in parsed.depth_tokens if depth and not asking.too_deep(depth)]
    fillers: dict[int, Filler] = {}
    if depths:
        dialect = endpoint.how("tokenize") if endpoint.can("tokenize") else None
        counter = await find_counter(client, endpoint.model, dialect, prose()[:4000])
        fillers = {depth: await build_filler(counter, depth) for depth in sorted(set(depths))}
    return replace(asking, fillers=fillers)


def _with_effort(switch: Switch, effort: str) -> Switch:
    on = switch.on
    if on.options is None:
        return switch
    return replace(switch, on=replace(on, options=on.options | {"reasoning_effort": effort}))


def _settings(asking: Asking, scenarios: list[Scenario], variants: list[Variant]) -> dict[str, Any]:
    return {
        "scenarios": {scenario.id: scenario.sha256[:16] for scenario in scenarios},
        "variants": [variant.name for variant in variants],
        "max_tokens": asking.max_tokens,
        "thinking": [asking.switch.on.options, asking.switch.off.options],
        "fillers": {str(depth): [filler.tokens, filler.sha256] for depth, filler in asking.fillers.items()},
    }
