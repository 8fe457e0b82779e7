"""Run by the interpreter that has lm_eval: its rolling log-likelihood of texts, by transformers or an endpoint.

One JSON object on standard input, one on the last line of standard output.
"""

import json
import sys
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.api.task import PerplexityTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoModelForImageTextToText, AutoTokenizer


def model(request: dict[str, Any]) -> Any:
    folder, context, prefix = request["folder"], request["context_tokens"], request["prefix"]
    if "url" in request:
        return LocalCompletionsAPI(
            base_url=f"{request['url']}/v1/completions",
            model=request["model"],
            tokenizer=folder,
            tokenizer_backend="huggingface",
            max_length=context + 1,
            custom_prefix_token_id=prefix,
        )
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return HFLM(
        pretrained=loaded,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        backend="causal",
        max_length=context - 1,
        prefix_token_id=prefix,
        add_bos_token=False,
        batch_size=1,
        device="cpu",
    )


def main() -> None:
    request = json.load(sys.stdin)
    texts = request["texts"]
    instances = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    found = model(request).loglikelihood_rolling(instances, disable_tqdm=True)
    words = [PerplexityTask.count_words(text) for text in texts]
    sizes = [PerplexityTask.count_bytes(text) for text in texts]
    result = {
        "nll": -sum(found),
        "word_perplexity": weighted_perplexity(list(zip(found, words, strict=True))),
        "byte_perplexity": weighted_perplexity(list(zip(found, sizes, strict=True))),
        "bits_per_byte": bits_per_byte(list(zip(found, sizes, strict=True))),
    }
    print(json.dumps(result))


main()
