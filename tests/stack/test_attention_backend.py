"""Our attention backend under the real vLLM: on a CPU its torch path, in the place of vLLM's own backend.

Page tables, metadata, the cache update in our page order, chunked prefill beside decodes, and MTP's verification of
several tokens are all the engine's; the kernels themselves are in tests/kernels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., dict[str, Any]]
MTP = {"method": "mtp", "num_speculative_tokens": 3}
MAX_TOKENS = 40
# A step takes 64 tokens: long prompts come in chunks, beside sequences that decode already.
CHUNKED = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True}


@pytest.fixture(scope="session")
def prompts(tiny: Path) -> list[list[int]]:
    from step128_checkpoint.tiny.reference import held_out_tokens

    tokens = held_out_tokens(tiny, 8000).tolist()
    return [tokens[900 * i : 900 * i + length] for i, length in enumerate((7, 45, 131, 300), start=1)]


@pytest.fixture
def generate(
    offline_vllm: Run, quantized: Callable[..., Path], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """A greedy run with our backend or vLLM's, of which the load report says that it was the one."""

    def run(ours: bool, **engine: Any) -> dict[str, Any]:
        monkeypatch.setenv("STEP128_CPU_ATTENTION", "1" if ours else "0")
        # The engine in this process has all requests before its first step. Else their arrival decides how they are
        # batched, and vLLM's drafts depend on that.
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # max_num_seqs: equal requests are run once a session, and these two differ in the environment only.
        arguments = {"model": quantized("all"), "max_num_seqs": 8 + ours}
        result = offline_vllm(engine=arguments | engine, prompts=prompts, max_tokens=MAX_TOKENS)
        assert result["returncode"] == 0, result["log"][-4000:]
        assert all(len(tokens) == MAX_TOKENS for tokens in result["tokens"])
        for report in result["reports"].values():
            assert (report["attention_backend"], report["attention_path"]) == ("CPU_ATTN", "torch" if ours else None)
        return result

    return run


@pytest.mark.serve
def test_float32_gives_vllms_own_tokens_and_drafts(generate: Run, measured: Callable[[str], None]) -> None:
    """No rounding, so no near tie to flip: every key of every page, mask and position is right.

    A window one key too wide moves the second token of the third prompt, and leads of others by 0.1 nats.
    """
    engine = {"dtype": "float32", "speculative_config": MTP, **CHUNKED}
    ours, stock = generate(True, **engine), generate(False, **engine)
    assert ours["tokens"] == stock["tokens"]
    assert ours["drafts"] == stock["drafts"] > 0 and ours["acceptance"] == stock["acceptance"]
    leads = [[lead for prompt in run["margins"] for lead in prompt] for run in (ours, stock)]
    worst = max(abs(mine - theirs) for mine, theirs in zip(*leads, strict=True))
    measured(f"attention, float32: ours = vLLM's in every token and draft; leads differ by {worst:.1e} nats at most")
    # Logits reach about 14, where float32 steps are 1e-6.
    assert worst < 1e-3


@pytest.mark.serve
def test_fp8_cache_and_mtp_depart_from_vllm_only_at_near_ties(generate: Run, measured: Callable[[str], None]) -> None:
    """vLLM's CPU kernels compute with bfloat16 what ours keep in float32, so a choice between two tokens that are
    nearly equal may fall differently. Pages of 128 tokens, a CPU's own choice; above they have 32.
    """
    engine = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "block_size": 128, "speculative_config": MTP, **CHUNKED}
    ours, stock = generate(True, **engine), generate(False, **engine)
    assert {report["kv_cache_dtype"] for report in ours["reports"].values()} == {"fp8"}
    assert ours["drafts"] > 0
    for number, (mine, theirs) in enumerate(zip(ours["tokens"], stock["tokens"], strict=True)):
        first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        if first is None:
            measured(f"attention, prompt {number}: ours = vLLM's over {MAX_TOKENS} tokens, bfloat16, FP8 KV, MTP 3")
            continue
        # Up to here both saw the same tokens, so in neither may one of the two be far ahead.
        our_lead, their_lead = ours["margins"][number][first], stock["margins"][number][first]
        measured(
            f"attention, prompt {number}: departs from vLLM's at token {first}, ahead by {our_lead:.4f} nats in ours, "
            f"{their_lead:.4f} in vLLM's"
        )
        # Logits reach about 14, where bfloat16 steps are 1/16, and a few such errors add up.
        assert max(our_lead, their_lead) < 0.5
    assert ours["acceptance"][0] > 0.3
