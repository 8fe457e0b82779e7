"""Drafts of MTP: how many are accepted, at which position, and what that is worth."""

from __future__ import annotations

from layout import SERVER, SOURCE, Band, dashboard
from panels import BLUE, GREEN, RED, YELLOW, Json, Query, bars, stat, steps, time_series

S = 'server=~"$server"'
COLLAPSED = ("Step128MtpAcceptanceCollapsed",)
NO_DRAFTS = "no drafts"


def _rate(name: str, by: str = "server") -> str:
    return f"sum by ({by}) (rate(vllm:{name}{{{S}}}[$__rate_interval]))"


DRAFTS = _rate("spec_decode_num_drafts_total")
DRAFTED = _rate("spec_decode_num_draft_tokens_total")
ACCEPTED = _rate("spec_decode_num_accepted_tokens_total")
POSITIONS = _rate("spec_decode_num_accepted_tokens_per_pos_total", "server, position")


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "speculation",
        "speculation by position",
        "What MTP's drafts yield. Every draft is verified, so answers are right whatever is seen here; speed is not.",
        [
            Band(4, ((6, _length_now()), (6, _share_now()), (4, _depth()), (8, _positions_now()))),
            Band(9, ((12, _positions()), (12, _length()))),
            Band(8, ((12, _tokens()), (12, _rejected()))),
        ],
        SOURCE,
        SERVER,
    )


def _length_now() -> Json:
    return stat(
        "Tokens a step",
        "1 and the accepted drafts, over 5 minutes (step128:mtp_accepted_length:tokens_rate5m). 1 is what a server "
        "without drafts does. That it should stay above 1.2 is an assumption.",
        "suffix: tok",
        Query(f"avg by (server) (step128:mtp_accepted_length:tokens_rate5m{{{S}}})", "{{server}}"),
        thresholds=steps((1.2, YELLOW), (1.5, GREEN), base=RED),
        decimals=2,
        no_value=NO_DRAFTS,
        alerts=COLLAPSED,
    )


def _share_now() -> Json:
    return stat(
        "Drafted tokens accepted",
        "vllm:spec_decode_num_accepted_tokens_total over vllm:spec_decode_num_draft_tokens_total, all positions "
        "together. It falls with the depth, so compare it with itself only.",
        "percentunit",
        Query(f"{ACCEPTED} / ({DRAFTED} > 0)", "{{server}}"),
        decimals=0,
        no_value=NO_DRAFTS,
        alerts=COLLAPSED,
    )


def _depth() -> Json:
    return stat(
        "Depth",
        "step128_plan_num_speculative_tokens: how many tokens the plan lets MTP draft in a step. 0: none.",
        "suffix: tok",
        Query(f"max by (server) (step128_plan_num_speculative_tokens{{{S}}})", "{{server}}"),
        thresholds=steps(base=BLUE),
        no_value="no plan",
    )


def _positions_now() -> Json:
    return bars(
        "Accepted by position, now",
        "Share of all steps in which the draft at this position was accepted, over 5 minutes. 0 is the first one "
        "drafted; a later one counts only where all before it were accepted.",
        "percentunit",
        Query(
            f"avg by (server, position) (step128:mtp_acceptance:ratio_rate5m{{{S}}})",
            "{{server}} position {{position}}",
        ),
        min=0,
        max=1,
        no_value=NO_DRAFTS,
        alerts=COLLAPSED,
    )


def _positions() -> Json:
    return time_series(
        "Accepted by position",
        "The same over time (vllm:spec_decode_num_accepted_tokens_per_pos_total over "
        "vllm:spec_decode_num_drafts_total). All positions fall at once: the draft. Later ones only: other traffic, "
        "and perhaps a smaller depth would do.",
        "percentunit",
        Query(f"{POSITIONS} / on (server) group_left () ({DRAFTS} > 0)", "{{server}} position {{position}}"),
        min=0,
        max=1,
        no_value=NO_DRAFTS,
        alerts=COLLAPSED,
    )


def _length() -> Json:
    return time_series(
        "Tokens a step",
        "1 + accepted over drafts: how many tokens one step of the whole model yields. Dashed: the alert's limit.",
        "suffix: tok",
        Query(f"1 + {ACCEPTED} / ({DRAFTS} > 0)", "{{server}}"),
        min=1,
        decimals=2,
        thresholds=steps((1.2, GREEN), base=RED),
        no_value=NO_DRAFTS,
        alerts=COLLAPSED,
    )


def _tokens() -> Json:
    return time_series(
        "Where generated tokens come from",
        "Steps of the whole model, one token each (vllm:spec_decode_num_drafts_total), and drafts that were accepted.",
        "suffix: tok/s",
        Query(DRAFTS, "{{server}} from the model"),
        Query(ACCEPTED, "{{server}} from accepted drafts"),
        min=0,
        stack=True,
    )


def _rejected() -> Json:
    return time_series(
        "Drafted in vain",
        "Drafted tokens a second that were rejected. They cost the draft's time and a wider verification.",
        "suffix: tok/s",
        Query(f"{DRAFTED} - {ACCEPTED}", "{{server}} rejected"),
        min=0,
    )
