"""The long proofs, run by `make proof`: every policy served through the launcher, with the settings varied.

What they print goes into LOG.md, with the date.
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import alive, descendants, launch
from safetensors.torch import load_file, save_file

# Every policy with both dtypes; ranks, MTP depth and compilation spread over them. Two ranks run eagerly: compiling
# them on two cores takes minutes.
CASES = [
    ("experts", "bfloat16", 1, 0, True),
    ("experts", "float32", 2, 3, False),
    ("experts+linears", "bfloat16", 2, 3, False),
    ("experts+linears", "float32", 1, 1, True),
    ("all-linears", "bfloat16", 2, 0, False),
    ("all-linears", "float32", 1, 3, True),
    ("all", "bfloat16", 1, 3, True),
    ("all", "float32", 2, 0, False),
]


@pytest.mark.proof
@pytest.mark.parametrize(("policy", "dtype", "ranks", "depth", "compiled"), CASES)
def test_served_and_answering(
    quantized: Callable[..., Path],
    cli: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    policy: str,
    dtype: str,
    ranks: int,
    depth: int,
    compiled: bool,
    measured: Callable[[str], None],
) -> None:
    options = ["--dtype", dtype, "--tensor-parallel-size", str(ranks), "--num-speculative-tokens", str(depth)]
    options.append("--no-enforce-eager" if compiled else "--enforce-eager")
    with launch(quantized(policy), tmp_path, options) as server:
        checks = server.checks()
        assert checks and all(line.startswith("PASS") for line in checks), checks
        question = ("--base-url", server.url, "--api-key-file", server.state / "api_key", "--vision-plumbing-only")
        result = cli("step128-eval", "smoke", *question, "--json")
        assert result.returncode == 0, result.stdout + result.stderr
        report = json.loads(result.stdout)
    print(
        f"\n{policy}, {dtype}, {ranks} ranks, MTP {depth}, {'compiled' if compiled else 'eager'}: {len(checks)} checks"
    )
    print(json.dumps(report["acceptance"]))


@pytest.mark.proof
def test_a_killed_launcher_takes_its_server_with_it(quantized: Callable[..., Path], tmp_path: Path) -> None:
    with launch(quantized(), tmp_path) as server:
        children = descendants(server.process.pid)
        assert len(children) >= 2
        server.process.kill()
        deadline = time.monotonic() + 60
        while alive(children) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not alive(children)


@pytest.mark.proof
def test_scales_for_the_trunk_only_as_in_the_published_checkpoint(
    tiny: Path, cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    published = tmp_path / "published"
    shutil.copytree(tiny, published)
    (shard,) = published.glob("*.safetensors")
    draft_scale = re.compile(r"model\.layers\.(9|10|11)\.self_attn\.[kv]_proj\.[kv]_scale")
    tensors = {name: tensor for name, tensor in load_file(shard).items() if not draft_scale.fullmatch(name)}
    save_file(tensors, shard, metadata={"format": "pt"})
    index_path = published / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in tensors}
    index_path.write_text(json.dumps(index))
    result = cli("step128-checkpoint", "quantize", "--method", "mse", published, tmp_path / "nl4")
    assert result.returncode == 0, result.stderr
    with launch(tmp_path / "nl4", tmp_path) as server:
        assert all(line.startswith("PASS") for line in server.checks()), server.checks()
        assert any(line.startswith("PASS kv_scales_mtp: ") for line in server.checks())
        assert "1.0" in server.log.read_text()  # the plan says what the MTP layers' cache uses


@pytest.mark.proof
def test_perplexity_of_every_policy(
    tiny: Path, dequantized: Callable[..., Path], measured: Callable[[str], None]
) -> None:
    from step128_checkpoint.tiny.reference import held_out_tokens, load_model, perplexity

    tokens = held_out_tokens(tiny, 98_304)
    found = {"bf16": perplexity(load_model(tiny), tokens)}
    for policy in ("experts", "experts+linears", "all-linears", "all"):
        for search in ("mse", "absmax"):
            found[f"{policy} {search}"] = perplexity(load_model(dequantized(policy, search)), tokens)
    for name, value in found.items():
        measured(f"perplexity of {len(tokens)} held-out tokens, {name}: {value:.3f}")
    for policy in ("experts+linears", "all-linears", "all"):
        assert found["bf16"] < found[f"{policy} mse"] < found[f"{policy} absmax"]
