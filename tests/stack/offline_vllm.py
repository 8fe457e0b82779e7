"""One run of the real vLLM in a process of its own; the last line of its output is one JSON document.

usage: offline_vllm.py REQUEST.json, with
  engine        arguments of vllm.LLM
  prompts       token id lists to continue greedily
  max_tokens    how far
  score         token id lists to score (perplexity), without MTP only: vLLM refuses both together
"""

import json
import math
import sys
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    defaults = {
        "load_format": "step128",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        "kv_cache_memory_bytes": 256 << 20,
        "limit_mm_per_prompt": {"image": 0},
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
    }
    engine = LLM(**(defaults | request["engine"]))
    result: dict[str, Any] = {"tokens": [], "margins": [], "nll": None}
    greedy = SamplingParams(
        temperature=0, max_tokens=request.get("max_tokens", 32), ignore_eos=True, logprobs=2, detokenize=False
    )
    if request.get("prompts"):
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy)
        for output in (o.outputs[0] for o in outputs):
            result["tokens"].append(list(output.token_ids))
            best = [sorted((p.logprob for p in position.values()), reverse=True) for position in output.logprobs]
            result["margins"].append([first - second for first, second, *_ in best])
    if request.get("score"):
        scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": text} for text in request["score"]], scoring)
        logprobs = [
            position[token].logprob
            for output, text in zip(outputs, request["score"], strict=True)
            for position, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)
        ]
        result["nll"] = -sum(logprobs) / len(logprobs)
        result["perplexity"] = math.exp(result["nll"])
    counters = {metric.name: metric for metric in engine.get_metrics()}
    drafts = counters.get("vllm:spec_decode_num_drafts")
    if drafts is not None and drafts.value:
        accepted = counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        result["acceptance"] = [count / drafts.value for count in accepted]
        result["drafts"] = drafts.value
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
