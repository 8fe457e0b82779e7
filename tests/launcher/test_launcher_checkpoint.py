"""What is read from a checkpoint's headers, and from nothing else."""

import io
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from step128_launcher.errors import LauncherError
from step128_launcher.model.checkpoint import read_footprint
from step128_launcher.model.model_config import read_model_config
from step128_launcher.model.quantization import CODEBOOK, Format
from step128_launcher.model.tensors import expected_tensors

MakeCheckpoint = Callable[..., Path]
MIB = 1 << 20
LM_HEAD = "lm_head.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def refusal(folder: Path, form: Format) -> LauncherError:
    with pytest.raises(LauncherError) as caught:
        read_footprint(folder, form)
    return caught.value


def test_footprint_of_a_quantized_checkpoint(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    found = read_footprint(make_checkpoint(), nl4_format)
    assert found.shards == 2
    assert found.mtp_layers == 3
    assert found.quantization is not None and found.quantization.policy == "all-linears"
    assert found.kv_scales is not None and set(found.kv_scales) == set(range(7))
    assert found.kv_scales[6].k == pytest.approx(0.07)
    assert found.kv_scales[6].v == pytest.approx(0.14)
    parts = {(part.name, part.draft): part for part in found.components}
    experts = parts["routed_experts", False]
    assert experts.quantized and experts.parameters == 3 * 3 * 4 * 32 * 64
    assert experts.stored_bytes == experts.parameters * 5 // 8
    assert parts["mtp_heads", True].quantized and not parts["embed_tokens", False].quantized
    assert sum(part.stored_bytes for part in found.components) == found.stored_bytes


def test_seventeen_tensors_per_mtp_layer(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    found = read_footprint(make_checkpoint(quantized=False, kv_scales=False), nl4_format)
    assert sum(part.tensors for part in found.components if part.draft) == 3 * 17


def test_unquantized_without_index_scales_and_mtp(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    found = read_footprint(make_checkpoint(quantized=False, kv_scales=False, mtp=False, index=False), nl4_format)
    assert (found.quantization, found.kv_scales, found.mtp_layers) == (None, None, 0)


def test_reads_what_safetensors_writes(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    folder = make_checkpoint(index=False)
    names: list[str] = []
    for shard in folder.glob("*.safetensors"):
        # BF16 is unknown to numpy, so the fabricated shards are re-saved with those tensors as F16.
        raw = shard.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        shard.write_bytes(raw[:8] + raw[8 : 8 + length].replace(b'"BF16"', b' "F16"') + raw[8 + length :])
        tensors = load_file(shard)
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, shard)
        names += tensors
    assert read_footprint(folder, nl4_format).tensors == len(names) > 100


def test_real_size_parameter_count(real_config: dict[str, Any], nl4_format: Format, tmp_path: Path) -> None:
    """The published model's count by component (closed form, equal to vLLM's instantiated model)."""
    (tmp_path / "config.json").write_text(json.dumps(real_config))
    table = expected_tensors(read_model_config(tmp_path), nl4_format, None)
    assert sum(math.prod(tensor.shape) for tensor in table.values()) == 169_648_118_368


def _without_mtp_scales(draft: Any) -> None:
    for layer in (4, 5, 6):
        for kind in ("k", "v"):
            del draft.tensors[f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"]


@pytest.mark.parametrize("quantized", [True, False])
def test_mtp_layers_may_have_no_scales(quantized: bool, make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    """As in the published checkpoint."""
    folder = make_checkpoint(quantized=quantized, spoil=_without_mtp_scales)
    found = read_footprint(folder, nl4_format)
    assert found.kv_scales is not None and set(found.kv_scales) == set(range(4))
    assert found.unscaled_layers == (4, 5, 6)


def test_forty_thousand_tensors_by_their_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from step128_launcher.model.shards import read_shards

    headers = 0
    for shard in range(100):
        entries = {
            f"model.layers.{shard}.t{i}.weight": {
                "dtype": "U8",
                "shape": [MIB],
                "data_offsets": [i * MIB, i * MIB + MIB],
            }
            for i in range(400)
        }
        raw = json.dumps(entries).encode()
        name = f"model-{shard + 1:05d}-of-00100.safetensors"
        (tmp_path / name).write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(tmp_path / name, 8 + len(raw) + 400 * MIB)  # sparse
        headers += 8 + len(raw)
    opened: list[Any] = []
    plain = Path.open

    class Counted(io.FileIO):
        taken = 0

        def read(self, size: int | None = -1) -> Any:
            data = super().read(size)
            self.taken += len(data or b"")
            return data

    def counted(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.suffix != ".safetensors":
            return plain(path, mode, *arguments, **options)
        opened.append(Counted(str(path), mode))
        return opened[-1]

    monkeypatch.setattr(Path, "open", counted)
    tensors, shards = read_shards(tmp_path)
    assert (len(tensors), shards) == (40_000, 100)
    assert len(opened) == 100 and sum(file.taken for file in opened) == headers


def test_codebook_is_the_kernels_codebook() -> None:
    from step128_kernels.codebook import CODEBOOK as THE_ONE

    assert tuple(THE_ONE) == CODEBOOK


def test_the_benchmarks_checkpoint_is_read_right() -> None:
    """40,000 tensors of the real size, a tensor for each of 308 experts: every one is found and weighed."""
    script = Path(__file__).parents[2] / "benchmarks" / "read_headers.py"
    process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    figures = json.loads(process.stdout)
    of_the_experts = (308 - 240) * 42 * (3 * 4096 * 1280 + 4096 + 1)  # with their router rows and biases
    assert figures["tensors"] == 1471 + (308 - 1) * 42 * 3 and figures["shards"] == 100
    assert figures["stored_bytes"] == 2 * (169_648_118_368 + of_the_experts)
