"""The recipe's commands as a user runs them, and the evaluation of what they make against the unpruned bf16 model."""

from __future__ import annotations

import json
import math
import random
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from step128_checkpoint.evaluation.blockwise import Comparison, Evaluation, EvaluationOptions, Subject, compare
from step128_checkpoint.evaluation.windows import Windows, token_windows
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.tiny.corpus import dialogue_texts, training_files
from step128_checkpoint.tiny.dialogues import Dialogue, random_dialogue
from step128_checkpoint.tiny.reference import held_out_tokens
from step128_checkpoint.tiny.tokenizer import END, IMAGE


@dataclass(frozen=True)
class Figures:
    """On held-out text: perplexity of code, and KL(reference || it) in nats a token, on code and on dialogues."""

    perplexity: float
    code_kl: float
    dialogue_kl: float


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
    reference: Figures = Figures(0.0, 0.0, 0.0)
    _count: int = field(default=0)

    def _run(self, command: str, source: Path | None, *options: str | Path) -> Path:
        self._count += 1
        out = self.folder / f"{self._count}-{command}"
        result = self.cli("step128-checkpoint", command, *([source] if source else []), out, *options)
        assert result.returncode == 0, result.stderr
        return out

    def samples(self, seed: int, samples: int, tokens: int) -> Path:
        """Of what the tiny model was trained on, in equal parts as then: experts are judged by what they learnt."""
        mixture = self.folder / "mixture"
        (mixture / "code").mkdir(parents=True)
        for number, text in enumerate(training_files()):
            (mixture / "code" / f"{number}.py").write_text(text.removesuffix(END))
        rng = random.Random(seed)
        dialogues = [dialogue for _ in range(2000) if not has_picture(dialogue := random_dialogue(rng))]
        lines = [json.dumps({"messages": d.messages, "tools": d.variables.get("tools", [])}) for d in dialogues]
        (mixture / "dialogues.jsonl").write_text("\n".join(lines))
        parts = [("code", "code", f"{mixture}/code", 1), ("dialogues", "chat", str(mixture), 1)]
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
            self.reference = Figures(self._code_perplexity(found), 0.0, 0.0)
        return {name: self._figures(row) for name, row in zip(variants, comparisons, strict=True)}

    def _code_perplexity(self, found: Evaluation) -> float:
        return math.exp(sum(found.window_nll[: self.windows]) / sum(found.window_scored[: self.windows]))

    def _figures(self, found: Comparison) -> Figures:
        scored, kl = found.evaluation.window_scored, found.window_kl
        parts = slice(self.windows), slice(self.windows, None)
        return Figures(self._code_perplexity(found.evaluation), *(sum(kl[part]) / sum(scored[part]) for part in parts))

    def _windows(self) -> Windows:
        """As many windows of held-out library files as of dialogues of another seed than the training's."""
        tokens = self.window_tokens * self.windows
        code = held_out_tokens(self.tiny, tokens).numpy()
        tokenizer = Tokenizer.from_file(str(self.tiny / "tokenizer.json"))
        texts = [text for text in dialogue_texts(2000, seed=1_000_000) if IMAGE not in text]
        dialogues = np.asarray([token for item in tokenizer.encode_batch(texts) for token in item.ids][:tokens])
        windows = np.concatenate([code, dialogues]).reshape(2 * self.windows, self.window_tokens)
        return token_windows(list(windows), f"windows of {self.window_tokens} tokens, no BOS; code, then dialogues")
