"""vLLM's own figures for the real-size model, made once a session in one process (see meta_models.py)."""

import itertools
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.model.checkpoint import ModelFootprint, assume_footprint, read_footprint
from step128_launcher.model.model_config import read_model_config
from step128_launcher.model.quantization import CODEBOOK, Format
from step128_launcher.model.tensors import expected_tensors

# Dimensions of Step-3.7-Flash pruned to 240 experts (its source: README.md beside it).
REAL_CONFIG = Path(__file__).parents[2] / "data" / "step-3.7-flash-240" / "config.json"
RANKS = (1, 2, 4, 8)
POLICIES = (None, "experts", "all-linears", "all")
UNEVEN = "uneven"  # not a policy: unquantized, numbers of experts and of tokens that ranks do not divide
FLOAT8 = "float8"  # not a policy either: compressed-tensors
FLOAT8_COMPONENTS = ("routed_experts", "shared_experts", "attention", "dense_mlp", "mtp_linears")
KV_AXES: dict[str, list[Any]] = {
    "drafts": [0, 3],
    "element": [1, 2],
    "block": [16, 64, 128],
    "batched": [2048, 8192],
    "asynchronous": [False, True],
    "context": [8192, 131072, 204800, 262144],
}


def _case(folder: Path, ranks: int, *, vision: bool = True, expert_parallel: bool = False) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "ranks": ranks,
        "vision": vision,
        "expert_parallel": expert_parallel,
        "kv_cache_dtype": "auto" if folder.name in ("None", UNEVEN) else "fp8",
    }


def _cases(folders: dict[str | None, Path]) -> dict[str, dict[str, Any]]:
    """Name -> case; the name is policy/ranks and what is unusual."""
    cases = {f"{policy}/{ranks}": _case(folders[policy], ranks) for policy, ranks in itertools.product(POLICIES, RANKS)}
    for policy in (None, "all"):
        cases[f"{policy}/4/text"] = _case(folders[policy], 4, vision=False)
    # More ranks than KV heads; experts shared out whole; numbers that 4 ranks do not divide.
    cases["all-linears/16"] = _case(folders["all-linears"], 16)
    cases["None/4/ep"] = _case(folders[None], 4, expert_parallel=True)
    cases["all/8/ep"] = _case(folders["all"], 8, expert_parallel=True)
    cases[f"{UNEVEN}/4/ep"] = _case(folders[UNEVEN], 4, expert_parallel=True)
    cases |= {f"{FLOAT8}/{ranks}": _case(folders[FLOAT8], ranks) for ranks in (1, 4, 16)}
    return cases


@pytest.fixture(scope="session")
def real_footprints(tmp_path_factory: pytest.TempPathFactory, nl4_format: Format) -> dict[str | None, ModelFootprint]:
    """Policy -> footprint of the real config.json, whose folder vLLM can read as a checkpoint's."""
    footprints = {}
    for policy in (*POLICIES, UNEVEN):
        folder = tmp_path_factory.mktemp("real") / str(policy)
        folder.mkdir()
        document = json.loads(REAL_CONFIG.read_text())
        if policy == UNEVEN:
            document["text_config"]["vocab_size"] = 128815
            document["text_config"]["moe_num_experts"] = 235
        elif policy is not None:
            components = list(nl4_format.policies[policy])
            document["quantization_config"] = _quantization(nl4_format, policy, components)
        (folder / "config.json").write_text(json.dumps(document))
        footprints[policy] = assume_footprint(folder, nl4_format, None)
    folder = tmp_path_factory.mktemp("real") / FLOAT8
    folder.mkdir()
    return footprints | {FLOAT8: _write_float8(folder, nl4_format)}


def _quantization(form: Format, policy: str, components: list[str]) -> dict[str, Any]:
    return {
        "quant_method": form.name,
        "format_version": form.version,
        "group_size": form.group_size,
        "bits_per_weight": form.bits_per_weight,
        "codebook": list(CODEBOOK),
        "scale_dtype": "float16",
        "policy": policy,
        "quantized_components": components,
        "unquantized_components": [],
        "method": "mse",
        "calibration": None,
    }


@pytest.fixture(scope="session")
def vllm_figures(
    tmp_path_factory: pytest.TempPathFactory, real_footprints: dict[str | None, ModelFootprint]
) -> Callable[[], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("vllm")
    done: list[dict[str, Any]] = []

    def figures() -> dict[str, Any]:
        if not done:
            done.append({})  # a failure is not tried again for every test
            cases = _cases({policy: footprint.path for policy, footprint in real_footprints.items()})
            kv = {"models": [f"all-linears/{ranks}" for ranks in RANKS], "axes": KV_AXES}
            (folder / "request.json").write_text(json.dumps({"models": cases, "kv": kv}))
            script = Path(__file__).parent / "meta_models.py"
            process = subprocess.run(
                [sys.executable, str(script), str(folder / "request.json"), str(folder / "result.json")],
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=False,
            )
            assert process.returncode == 0, process.stdout + process.stderr
            done[0] = {"cases": cases} | json.loads((folder / "result.json").read_text())
        assert done[0], "vLLM's figures could not be made: see the first test that asked for them"
        return done[0]

    return figures


def _float8_section() -> dict[str, Any]:
    """compressed-tensors as llm-compressor writes FP8: a scale a row, only the trunk's and the MTP layers' linears.

    The one foreign format that vLLM builds on a CPU.
    """
    values = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": values | {"strategy": "channel", "dynamic": False},
        "input_activations": values | {"strategy": "token", "dynamic": True},
    }
    ignored = ("vision_model.*", "vit_large.*", "g_proj", "shared_head.*", "eh_proj")
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", *(f"re:.*{name}" for name in ignored)],
        "config_groups": {"group_0": scheme},
    }


def _write_float8(folder: Path, form: Format) -> ModelFootprint:
    """Write a checkpoint without data (a sparse file), its scales in bfloat16, and read it."""
    document = json.loads(REAL_CONFIG.read_text()) | {"quantization_config": _float8_section()}
    (folder / "config.json").write_text(json.dumps(document))
    header: dict[str, Any] = {}
    end = 0

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal end
        begin, end = end, end + math.prod(shape) * (1 if dtype == "F8_E4M3" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    for weight in expected_tensors(read_model_config(folder), form, None).values():
        if weight.component in FLOAT8_COMPONENTS:
            add(weight.name, "F8_E4M3", weight.shape)
            add(f"{weight.name}_scale", "BF16", (*weight.shape[:-1], 1))
        else:
            add(weight.name, "BF16", weight.shape)
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(folder / "model.safetensors", 8 + len(raw) + end)
    return read_footprint(folder, form)
