"""The recipe's commands as a user runs them, and the evaluation of what they make against the unpruned bf16 model."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from step128_checkpoint.evaluation.blockwise import EvaluationOptions, Subject, compare
from step128_checkpoint.evaluation.windows import Windows, token_windows
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.tiny.corpus import training_files
from step128_checkpoint.tiny.dialogues import Dialogue, random_dialogue
from step128_checkpoint.tiny.reference import held_out_tokens
from step128_checkpoint.tiny.tokenizer import END

Figures = tuple[float, float]  # perplexity, and KL(reference || it) in nats


def has_picture(dialogue: Dialogue) -> bool:
    """The tiny model's vision tower is untrained: its pictures are noise."""
    return any(isinstance(message["content"], list) for message in dialogue.messages)


@dataclass
class Recipe:
    """One seed's products in one folder."""

    tiny: Path
    folder: Path
    cli: Callable[..., subprocess.CompletedProcess[str]]
    window_tokens: int
    windows: int
    reference: Figures = (0.0, 0.0)
    _count: int = field(default=0)

    def _run(self, command: str, source: Path | None, *options: str | Path) -> Path:
        self._count += 1
        out = self.folder / f"{self._count}-{command}"
        result = self.cli("step128-checkpoint", command, *([source] if source else []), out, *options)
        assert result.returncode == 0, result.stderr
        return out

    def samples(self, seed: int, samples: int, tokens: int) -> Path:
        """Of what the tiny model was trained on, so that experts are judged by the work they have learnt."""
        mixture = self.folder / "mixture"
        (mixture / "code").mkdir(parents=True)
        for number, text in enumerate(training_files()):
            (mixture / "code" / f"{number}.py").write_text(text.removesuffix(END))
        rng = random.Random(seed)
        dialogues = [dialogue for _ in range(2000) if not has_picture(dialogue := random_dialogue(rng))]
        lines = [json.dumps({"messages": d.messages, "tools": d.variables.get("tools", [])}) for d in dialogues]
        (mixture / "dialogues.jsonl").write_text("\n".join(lines))
        parts = [("code", "code", f"{mixture}/code", 3), ("dialogues", "chat", str(mixture), 1)]
        document = {
            "format": "step128-mixture",
            "format_version": 1,
            "parts": [
                {"name": name, "kind": kind, "source": f"folder:{place}", "weight": weight}
                for name, kind, place, weight in parts
            ],
        }
        (mixture / "mixture.yaml").write_text(json.dumps(document))  # JSON is YAML too
        numbers = ("--samples", str(samples), "--tokens", str(tokens), "--seed", str(seed))
        return self._run("samples", None, "--tokenizer", self.tiny, "--mixture", mixture / "mixture.yaml", *numbers)

    def calibrate(self, source: Path, samples: Path, *options: str) -> Path:
        return self._run("calibrate", source, "--samples-from", samples, *options)

    def prune(self, calibration: Path, keep: int, criterion: str, *options: str) -> Path:
        chosen = ("--calibration", calibration, "--keep", str(keep), "--criterion", criterion)
        return self._run("prune", self.tiny, *chosen, *options)

    def quantize(self, source: Path, calibration: Path, method: str) -> Path:
        options = ("--calibration", calibration, "--method", method, "--kv-scales", "calibrated")
        return self._run("quantize", source, *options)

    def evaluate(
        self, variants: Mapping[str, Path], kv_cache: str = "bf16", against: Path | None = None
    ) -> dict[str, Figures]:
        """Against the unpruned model, or another; the reference keeps its K and V as they are computed."""
        options = EvaluationOptions(kv_cache=kv_cache, dtype=torch.float32)  # type: ignore[arg-type]
        candidates = [Subject(open_checkpoint(folder), options) for folder in variants.values()]
        reference = Subject(open_checkpoint(against or self.tiny), EvaluationOptions(dtype=torch.float32))
        found, comparisons = compare(reference, candidates, self._windows())
        if against is None:
            self.reference = (found.perplexity, 0.0)
        return {name: (row.evaluation.perplexity, row.mean_kl) for name, row in zip(variants, comparisons, strict=True)}

    def _windows(self) -> Windows:
        ids = held_out_tokens(self.tiny, self.window_tokens * self.windows).view(self.windows, -1)
        return token_windows(list(ids.numpy()), f"held-out library text, {self.window_tokens} tokens each, no BOS")
