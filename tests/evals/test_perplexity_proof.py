"""Perplexity against other programs on the same weights: vLLM, transformers, lm-eval, llama.cpp; float32 throughout.

`make proof` prints the figures; they go into LOG.md.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
from foreign_server import ForeignUnavailableError, environment, gguf, llama_binary
from launched import Server, launch
from smollm import expand

pytestmark = pytest.mark.proof

CONTEXT = 512
PREFIX = "<|begin_of_sentence|>"
LM_EVAL = "lm_eval[hf,api]==0.4.13"
Cli = Callable[..., subprocess.CompletedProcess[str]]


def prose(characters: int) -> str:
    """Python's language reference, as help() shows it."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))[:characters].strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity")
    texts = (prose(40_000), prose(60_000)[45_000:])
    (path / "text").write_text(texts[0])
    (path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--dtype", "float32", "--kv-cache-dtype", "auto", "--num-speculative-tokens", "0", "--enforce-eager"]
    with launch(tiny, tmp_path_factory.mktemp("serve"), options) as running:
        yield running


def ppl(cli: Cli, folder: Path, out: str, *options: str | Path) -> dict[str, Any]:
    result = cli("step128-eval", "ppl", *options, "--out", folder / out, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def remote(server: Server) -> tuple[str | Path, ...]:
    return ("--base-url", server.url, "--api-key-file", server.state / "api_key")


DEFINITIONS: dict[str, tuple[str, ...]] = {
    "step128": ("--context-tokens", str(CONTEXT), "--max-chunks", "12"),
    "stride": ("--context-tokens", str(CONTEXT), "--stride", "128", "--max-chunks", "12"),
    "llama.cpp": ("--context-tokens", str(CONTEXT), "--definition", "llama.cpp", "--max-chunks", "12"),
    "lm-eval": ("--context-tokens", str(CONTEXT), "--definition", "lm-eval", "--prefix-token", PREFIX),
}


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_vllm_equals_transformers(
    cli: Cli, server: Server, tiny: Path, folder: Path, definition: str, measured: Callable[[str], None]
) -> None:
    options = ("--text", folder / "text", *DEFINITIONS[definition])
    local = ppl(cli, folder, f"{definition}.jsonl", "--local", tiny, "--top-k", "20", *options)
    reference = ("--reference", folder / f"{definition}.jsonl")
    served = ppl(cli, folder, f"{definition}-served.jsonl", *remote(server), *reference, *options)
    worst = max(
        abs(a - b) / n
        for a, b, n in zip(served["chunk_nll"], local["chunk_nll"], local["chunk_positions"], strict=True)
    )
    measured(
        f"perplexity, {definition}: vLLM {served['perplexity']:.6f}, transformers {local['perplexity']:.6f} on "
        f"{served['scored_tokens']} tokens; worst chunk {worst:.1e} nats a token; mean KL {served['mean_kl']:.1e}"
    )
    assert worst < 1e-3
    assert served["perplexity"] == pytest.approx(local["perplexity"], rel=1e-3)
    assert abs(served["nll_per_token"] - local["nll_per_token"]) < 1e-5  # two programs in float32
    assert served["kl"]["same_top_token"] > 0.999 and served["mean_kl"] < 1e-6


@pytest.fixture(scope="module")
def lm_eval() -> Iterator[Path]:
    """An interpreter with lm_eval beside our own packages; the package index is asked, so without it: skipped."""
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        python = Path(name, "bin/python")
        site = sysconfig.get_path("purelib", vars={"base": name})
        # addsitedir, and not the folder alone: our own environment's .pth files must take effect too.
        ours = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        Path(site, "ours.pth").write_text(ours)
        command = [python, "-m", "pip", "install", "--quiet", LM_EVAL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{LM_EVAL} cannot be installed: {done.stderr.strip()[-300:]}")
        yield python


@pytest.mark.parametrize("backend", ["hf", "local-completions"])
def test_lm_eval_itself(
    cli: Cli,
    server: Server,
    tiny: Path,
    folder: Path,
    lm_eval: Path,
    backend: str,
    measured: Callable[[str], None],
) -> None:
    """Two documents: their words and bytes count, and no window spans both."""
    rows = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    request = {"folder": str(tiny), "context_tokens": CONTEXT, "texts": [row["text"] for row in rows], "prefix": 0}
    if backend == "local-completions":
        request |= {"url": server.url, "model": "tiny"}
    done = subprocess.run(
        [lm_eval, Path(__file__).with_name("lm_eval_oracle.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": server.key},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    where = ("--local", tiny) if backend == "hf" else remote(server)
    data = ("--dataset", folder / "documents.jsonl")
    ours = ppl(cli, folder, f"{backend}.jsonl", *where, *data, *DEFINITIONS["lm-eval"])
    assert ours["prefix_token_id"] == 0 and ours["whole_documents"] == 2
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        measured(f"perplexity, lm-eval 0.4.13 ({backend}): {name} {theirs[name]:.6f}, ours {ours[name]:.6f}")
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert math.fsum(ours["chunk_nll"]) == pytest.approx(theirs["nll"], rel=1e-6)


LLAMA_CONTEXT, LLAMA_CHUNKS = 128, 4  # float32 in llama.cpp on a CPU: a minute


def llama_perplexity(binary: Path, model: Path, text: Path, *options: str) -> list[float]:
    """The running perplexities after each chunk, as llama-perplexity prints them."""
    command = [binary, "--model", model, "--file", text, "--ctx-size", str(LLAMA_CONTEXT), "--batch-size"]
    command += [str(LLAMA_CONTEXT), "--chunks", str(LLAMA_CHUNKS), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(binary), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"\[(\d+)\]([\d.]+),", done.stdout + done.stderr)
    assert [int(number) for number, _ in found] == list(range(1, LLAMA_CHUNKS + 1))
    return [float(value) for _, value in found]


@pytest.mark.parametrize("bos", [False, True])
def test_llama_cpp_itself(cli: Cli, folder: Path, bos: bool, measured: Callable[[str], None]) -> None:
    """SmolLM2, expanded from 4 bits to float32 for both programs; with a BOS too, which replaces each first token."""
    try:
        binary, source = llama_binary("llama-perplexity"), gguf()
    except ForeignUnavailableError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as name:  # more than a gigabyte: not kept among pytest's folders
        checkpoint, copy = expand(source, Path(name), bos)
        # llama.cpp's own cache is float16, and its flash attention computes with it.
        exact = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
        theirs = llama_perplexity(binary, copy, folder / "text", *exact)
        options = ("--text", folder / "text", "--definition", "llama.cpp", "--context-tokens", str(LLAMA_CONTEXT))
        count = ("--max-chunks", str(LLAMA_CHUNKS))
        ours = ppl(cli, folder, f"llama-{bos}.jsonl", "--local", checkpoint, *options, *count)
        running = [
            math.exp(math.fsum(ours["chunk_nll"][:n]) / sum(ours["chunk_positions"][:n]))
            for n in range(1, LLAMA_CHUNKS + 1)
        ]
        measured(f"perplexity, llama-perplexity, BOS {bos}: {theirs}, ours {[round(value, 4) for value in running]}")
        assert ours["bos_token_ids"] == ([1] if bos else [])
        assert running == pytest.approx(theirs, rel=1e-4)  # it prints four digits
        if not bos:
            # The 4-bit file itself: llama.cpp rounds the activations to 8 bits there, which costs less than 2 %.
            rounded = llama_perplexity(binary, source, folder / "text")
            measured(f"perplexity, llama-perplexity on the 4-bit file: {rounded[-1]}")
            assert rounded == pytest.approx(running, rel=0.02)


def test_model_card_takes_the_summary(cli: Cli, tiny: Path, folder: Path) -> None:
    report = folder / "card.json"
    options = ("--text", folder / "text", "--context-tokens", str(CONTEXT), "--max-chunks", "2")
    report.write_text(json.dumps(ppl(cli, folder, "card.jsonl", "--local", tiny, *options)))
    copy = folder / "copy"
    copy.mkdir()
    for path in tiny.iterdir():
        (copy / path.name).symlink_to(path)
    result = cli("step128-checkpoint", "model-card", copy, "--evals", report)
    assert result.returncode == 0, result.stderr
    card = (copy / "README.md").read_text()
    assert "| perplexity |" in card and "non-overlapping chunks of 512 tokens" in card
    assert "perplexity: not measured" not in card
