"""An earlier run of the same text and settings, on another endpoint or local, that a run is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_evals.errors import BadInputError
from step128_evals.files import sha256
from step128_evals.perplexity.scoring import Scores, Top
from step128_evals.perplexity.topk import divergence, pack_floats, unpack_floats, unpack_tops
from step128_evals.runs import Run, read_run

# What must be equal for the windows to be the same.
_SAME = (
    "definition",
    "text_sha256",
    "context_tokens",
    "stride_tokens",
    "bos_token_ids",
    "prefix_token_id",
    "separator",
)


def tokens_sha256(prompt: tuple[int, ...] | str) -> str:
    """Names a window's tokens, so that two tokenizers are not taken for one."""
    return sha256(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)))[:16]


@dataclass(frozen=True)
class Reference:
    """Its items have the likeliest tokens."""

    run: Run

    @property
    def top_k(self) -> int:
        """Likeliest tokens of a position."""
        return int(self.run.manifest.settings["top_k"])

    @property
    def identity(self) -> dict[str, Any]:
        """For the manifest of the run that is compared with it."""
        manifest = self.run.manifest
        return {"model": manifest.model, "base_url": manifest.base_url, "started": manifest.started}

    def check(self, settings: dict[str, Any], ids: list[str]) -> None:
        """Raise BadInputError unless it measured these windows, all of them."""
        path, theirs = self.run.path, self.run.manifest.settings
        for name in _SAME:
            if theirs.get(name) != settings.get(name):
                raise BadInputError(
                    f"{path} cannot be the reference: its {name} is {theirs.get(name)!r}, here it is "
                    f"{settings.get(name)!r}. Both runs need the same text and settings."
                )
        missing = [id for id in ids if id not in self.run.items or self.run.items[id].status != "measured"]
        if missing:
            raise BadInputError(
                f"{path} cannot be the reference: it lacks {len(missing)} of {len(ids)} chunks, {missing[0]} for one. "
                "Finish that run first, or use --max-chunks here."
            )

    def compare(self, id: str, prompt: tuple[int, ...] | str, scores: Scores) -> dict[str, Any]:
        """KL(reference || this) of one window, for its item.

        Raises:
            BadInputError: the reference's tokens are others.
        """
        item = self.run.items[id]
        if item.data["tokens_sha256"] != tokens_sha256(prompt):
            raise BadInputError(f"{self.run.path} cannot be the reference: its chunk {id} has other tokens")
        reference = unpack_tops(item.data["top"])
        if len(reference) != len(scores.top):
            raise BadInputError(f"{self.run.path} cannot be the reference: its chunk {id} has other positions")
        if _kind(reference) != _kind(scores.top):
            raise BadInputError(
                f"{self.run.path} cannot be the reference: one run names tokens by their ids, the other (an endpoint "
                "with `echo`) by their texts"
            )
        values, kept, same = [], 0.0, 0
        own = (-unpack_floats(item.data["token_nll"])).tolist()
        rows = zip(reference, own, scores.top, scores.tokens, scores.logprobs, strict=True)
        for theirs, their_own, ours, token, our_own in rows:
            same += next(iter(theirs)) == next(iter(ours))
            kl, known = divergence({token: their_own, **theirs}, {token: our_own, **ours})
            values.append(kl)
            kept += known
        return {"sum": sum(values), "same_top": same, "kept": kept, "values": pack_floats(values)}


def read_reference(path: Path) -> Reference:
    """Read a result file that can be a reference.

    Raises:
        BadInputError: it is of another eval, or has no likeliest tokens; and as :func:`read_run`.
    """
    run = read_run(path)
    if run.manifest.eval != "ppl":
        raise BadInputError(f"{path} cannot be the reference: it is a result of {run.manifest.eval}, not of ppl")
    if not run.manifest.settings.get("top_k"):
        raise BadInputError(f"{path} cannot be the reference: it was measured without --top-k")
    return Reference(run)


def _kind(tops: list[Top] | tuple[Top, ...]) -> str:
    return "texts" if any(isinstance(label, str) for top in tops for label in top) else "ids"
