"""``probe``: what an endpoint can do, and so which evals apply to it."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from step128_evals.client import Client
from step128_evals.options import Parsers, Result, add_endpoint_command
from step128_evals.probe import CAPABILITIES, Endpoint, probe_endpoint

NEEDED_BY = {
    "chat": "needle, tools, vision, reasoning, soak",
    "streaming": "depth, tools (streamed half)",
    "completions": "ppl, acceptance, depth",
    "tokenize": "ppl; exact depths of all others",
    "prompt_logprobs": "ppl",
    "tools": "tools",
    "images": "vision",
    "reasoning_effort": "reasoning",
    "metrics": "acceptance, soak (memory)",
    "speculative_decoding": "acceptance",
}


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    add_endpoint_command(commands, "probe", "what the endpoint can do, one tiny request each", _probe)


async def _probe(parsed: argparse.Namespace, client: Client) -> Result:
    endpoint = await probe_endpoint(client, parsed.model)
    if not parsed.json:
        _print(endpoint)
    return endpoint.as_dict(), 0


def _print(endpoint: Endpoint) -> None:
    context = f"{endpoint.max_context_tokens} tokens" if endpoint.max_context_tokens else "not said"
    table = Table("capability", "", "how, or why not", "evals that need it", title_justify="left")
    table.title = escape(f"{endpoint.base_url}: {endpoint.server}, model {endpoint.model}, context {context}")
    for name in CAPABILITIES:
        mark = "yes" if endpoint.can(name) else "no"
        table.add_row(name, mark, escape(endpoint.how(name)), NEEDED_BY[name])
    Console().print(table)
