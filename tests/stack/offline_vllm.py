"""One run of the real vLLM in a process of its own: offline_vllm.py REQUEST.json RESULT.json. A request has
engine        arguments of vllm.LLM
prompts       token id lists to continue greedily
max_tokens    how far
score         token id lists to score (perplexity), without MTP only: vLLM refuses both together
picture       a question about a drawn picture; its answer and log-probabilities come back under "picture"
"""

import base64
import io
import json
import math
import sys
from pathlib import Path
from typing import Any


def draw_picture(red: int) -> str:
    """A PNG with more in it than one colour, in base64; `red` (0..255) tells two pictures apart."""
    from PIL import Image

    image = Image.linear_gradient("L").convert("RGB").resize((200, 120))
    image.paste((red, 30, 200 - red // 2), (20, 20, 190, 100))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def question_about(picture: str, question: str) -> dict[str, Any]:
    """A chat message with a picture in it."""
    url = {"url": f"data:image/png;base64,{picture}"}
    return {"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": question}]}


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
    if request.get("picture"):
        result["pictures"] = [
            {
                "tokens": list(output.token_ids),
                "logprobs": [
                    position[token].logprob for position, token in zip(output.logprobs, output.token_ids, strict=True)
                ],
            }
            for output in (
                engine.chat([question_about(draw_picture(red), request["picture"])], greedy)[0].outputs[0]
                for red in (30, 220)
            )
        ]
    counters = {metric.name: metric for metric in engine.get_metrics()}
    drafts = counters.get("vllm:spec_decode_num_drafts")
    if drafts is not None and drafts.value:
        accepted = counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        result["acceptance"] = [count / drafts.value for count in accepted]
        result["drafts"] = drafts.value
    return result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
