"""A result file of ``acceptance`` as figures, text and pictures, beside the model card's figures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from step128_evals.acceptance.figures import drafted_depth, figures
from step128_evals.runs import Run
from step128_evals.tables import columns, markdown_table, number, with_interval

CARD = (0.92, 0.75, 0.55)
"""The card of Step-3.7-Flash-240REAP gives these, without text, temperature or convention."""


def summarize(run: Run) -> dict[str, Any]:
    """Figures by domain and over all prompts; ``acceptance`` and the keys after it are over all, without intervals."""
    depth = drafted_depth(run)
    measured = run.with_status("measured")
    positions = depth or 0
    everything = figures(measured, positions)
    rates = [position["rate"] for position in everything["positions"].values()]
    return {
        "num_speculative_tokens": depth,
        "max_tokens": run.manifest.settings["max_tokens"],
        "acceptance": {"drafts": everything["drafts"], "rates": rates} if everything["drafts"] else None,
        "mean_accepted_length": everything["mean_accepted_length"],
        "tokens_per_second": everything["tokens_per_second"],
        "prompts": everything["prompts"],
        "generated_tokens": everything["generated_tokens"],
        "seconds": everything["seconds"],
        "domains": {
            domain: figures([item for item in measured if item.data["domain"] == domain], positions)
            for domain in run.manifest.settings["domains"]
        },
        "all": everything,
        "unsupported": len(run.with_status("unsupported")),
        "missing": run.missing,
    }


def text(summary: dict[str, Any]) -> str:
    """Tables of acceptance and speed, and the card's figures."""
    lines = [_what(summary), ""]
    if summary["acceptance"]:
        lines += [columns(acceptance_rows(summary)), "", *_card(summary), ""]
    lines += [
        columns(speed_rows(summary)),
        "",
        "Brackets: 95 % intervals, bootstrap over prompts.",
        *_measured(summary),
    ]
    lines += ["", _for_the_planner(summary)] if summary["acceptance"] else []
    return "\n".join(lines)


def headline(summary: dict[str, Any]) -> str:
    """Rates over all prompts."""
    if not summary["acceptance"]:
        speed = number(summary["all"]["decode_tokens_per_second"], 1)
        return f"nothing was drafted in {summary['prompts']} prompts; {speed} tokens/s decoding"
    rates = " / ".join(f"{rate:.2f}" for rate in summary["acceptance"]["rates"])
    conditional = " / ".join(number(row["conditional"], 2) for row in summary["all"]["positions"].values())
    length = with_interval(summary["mean_accepted_length"], summary["all"]["mean_accepted_length_interval"], 2)
    return f"{rates} cumulative, {conditional} conditional, {length} tokens a step, {summary['prompts']} prompts"


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """The same as tables of Markdown, with a picture."""
    from step128_evals.acceptance.pictures import draw_domains

    parts = [_what(summary)]
    if summary["acceptance"]:
        parts += [markdown_table(acceptance_rows(summary)), " ".join(_card(summary))]
    parts.append(markdown_table(speed_rows(summary)))
    if summary["prompts"]:
        draw_domains(summary, pictures / "acceptance.svg")
        parts.append("![acceptance and speed by domain](acceptance.svg)")
    parts.append("Brackets and whiskers: 95 % intervals, bootstrap over prompts.")
    parts.append(" ".join(_measured(summary)))
    return "\n\n".join(parts)


def score(run: Run) -> dict[str, float]:
    """Tokens a step of the target model made, by prompt; 1 without drafts."""
    return {
        item.id: 1 + sum(item.data["accepted"]) / item.data["drafts"] if item.data["drafts"] else 1.0
        for item in run.with_status("measured")
    }


def acceptance_rows(summary: dict[str, Any]) -> list[list[str]]:
    """A row a domain: cumulative and conditional rate of each position, and the mean accepted length."""
    positions = list(summary["all"]["positions"])
    heads = ["domain", "prompts", "drafts", *(f"position {i}" for i in positions)]
    rows = [[*heads, *(f"{i} given {int(i) - 1}" for i in positions[1:]), "tokens a step"]]
    for name, group in _groups(summary):
        cells = [with_interval(row["rate"], row["rate_interval"], 2) for row in group["positions"].values()]
        given = [with_interval(r["conditional"], r["conditional_interval"], 2) for r in group["positions"].values()]
        length = with_interval(group["mean_accepted_length"], group["mean_accepted_length_interval"], 2)
        rows.append([name, str(group["prompts"]), str(group["drafts"]), *cells, *given[1:], length])
    return rows


def speed_rows(summary: dict[str, Any]) -> list[list[str]]:
    """A row a domain: tokens a second of decoding, and of the whole request."""
    rows = [["domain", "prompts", "tokens", "decoding, tokens/s", "with the prompt, tokens/s"]]
    for name, group in _groups(summary):
        speeds = [
            with_interval(group[key], group[f"{key}_interval"], 1)
            for key in ("decode_tokens_per_second", "tokens_per_second")
        ]
        rows.append([name, str(group["prompts"]), str(group["generated_tokens"]), *speeds])
    return rows


def _groups(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    groups = list(summary["domains"].items())
    return [*groups, ("all", summary["all"])] if len(groups) > 1 else groups


def _what(summary: dict[str, Any]) -> str:
    depth = summary["num_speculative_tokens"]
    how = {None: "how many tokens are drafted is not known", 0: "without MTP (nothing is drafted)"}.get(
        depth, f"MTP {depth}, that is up to {depth} drafted a step"
    )
    notes = f"; prompts still missing: {summary['missing']}" if summary["missing"] else ""
    notes += f"; unsupported: {summary['unsupported']}" if summary["unsupported"] else ""
    return f"{summary['prompts']} prompts, greedy, one at a time; {how}{notes}."


def _measured(summary: dict[str, Any]) -> list[str]:
    """Which tokens of an answer the figures are over."""
    most = summary["max_tokens"]
    return [
        f"code, prose, long and text: {most} generated tokens, so what follows a natural end counts too (not on a "
        "server that refuses ignore_eos).",
        f"chat and maths: the first {most} tokens of an answer or less, mostly thinking if the model reasons.",
    ]


def _card(summary: dict[str, Any]) -> list[str]:
    """The card does not say which convention its figures follow: what each would mean."""
    products = list(itertools.accumulate(CARD, lambda a, b: a * b))
    quotients = [CARD[0], *(b / a for a, b in itertools.pairwise(CARD))]
    given = ", ".join(f"{value:g}" for value in CARD)
    return [
        f"The model card gives {given}, for a text and a convention that it does not name.",
        f"Read as cumulative: conditional {_row(quotients)}, {1 + sum(CARD):.2f} tokens a step.",
        f"Read as conditional: cumulative {_row(products)}, {1 + sum(products):.2f} tokens a step.",
    ]


def _row(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _for_the_planner(summary: dict[str, Any]) -> str:
    rates = ",".join(f"{rate:.3f}" for rate in summary["acceptance"]["rates"])
    return f"For the planner: step128 plan MODEL --acceptance {rates} --acceptance-unconditional"
