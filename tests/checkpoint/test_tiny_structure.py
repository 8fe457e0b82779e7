"""The tiny checkpoint has the big one's structure: names, shapes, config, and the same numbers in transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from step128_checkpoint.cli import main
from step128_checkpoint.tiny import OutputExistsError, TinyResult, cli, make_tiny
from step128_checkpoint.tiny.config import text_spec
from step128_checkpoint.tiny.reference import held_out_tokens, load_model, perplexity

STEPS = 2
HIDDEN, VOCAB, EXPERTS, HEAD_DIM = 192, 2048, 16, 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, TinyResult]:
    """(checkpoint, cache folder, result) of an almost untrained model."""
    root = tmp_path_factory.mktemp("tiny")
    result = make_tiny(root / "out", steps=STEPS, cache_dir=root / "cache", progress=False)
    return root / "out", root / "cache", result


@pytest.fixture(scope="module")
def tensors(made: tuple[Path, Path, TinyResult]) -> dict[str, torch.Tensor]:
    return load_file(made[0] / "model.safetensors")


def attention_shapes(heads: int) -> dict[str, tuple[int, ...]]:
    kv = 2 * HEAD_DIM
    return {
        "self_attn.q_proj.weight": (heads * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, heads * HEAD_DIM),
        "self_attn.g_proj.weight": (heads, HIDDEN),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }


def mlp_shapes(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, HIDDEN),
        f"{prefix}.up_proj.weight": (inner, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, inner),
    }


def expected_text_shapes() -> dict[str, tuple[int, ...]]:
    """Hub names and shapes of the text part and the MTP layers, written out independently of the model."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(12):
        layer = attention_shapes(4 if i in (0, 4, 8) else 6)
        if 3 <= i < 9:
            layer |= {"moe.gate.weight": (EXPERTS, HIDDEN), "moe.router_bias": (EXPERTS,)}
            layer |= {f"moe.{kind}_proj.weight": (EXPERTS, 64, HIDDEN) for kind in ("gate", "up")}
            layer |= {"moe.down_proj.weight": (EXPERTS, HIDDEN, 64)} | mlp_shapes("share_expert", 64)
        else:
            layer |= mlp_shapes("mlp", 384)
        if i >= 9:
            layer |= {"enorm.weight": (HIDDEN,), "hnorm.weight": (HIDDEN,), "eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
            layer |= {"transformer.shared_head.norm.weight": (HIDDEN,)}
            layer |= {"transformer.shared_head.output.weight": (VOCAB, HIDDEN)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def test_text_tensors_have_the_hubs_names_and_shapes(tensors: dict[str, torch.Tensor]) -> None:
    found = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not name.startswith(("vision_model.", "vit_")) and not name.endswith("_scale")
    }
    assert found == expected_text_shapes()


def test_every_mtp_layer_has_17_tensors(tensors: dict[str, torch.Tensor]) -> None:
    for i in (9, 10, 11):
        names = [n for n in tensors if n.startswith(f"model.layers.{i}.") and not n.endswith("_scale")]
        assert len(names) == 17


def test_kv_scales_cover_all_layers_in_float32(tensors: dict[str, torch.Tensor]) -> None:
    for i in range(12):
        for kind in "kv":
            scale = tensors[f"model.layers.{i}.self_attn.{kind}_proj.{kind}_scale"]
            assert scale.dtype == torch.float32 and scale.shape == (1,) and 0 < float(scale) < 1


def test_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        wide = name.endswith(("router_bias", "_scale"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_config_keeps_the_hubs_pattern_and_names_no_remote_code(made: tuple[Path, Path, TinyResult]) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    text = config["text_config"]
    assert config["architectures"] == ["Step3p7ForConditionalGeneration"] and "auto_map" not in config
    for key in ("rope_theta", "layer_types", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        assert len(text[key]) == 12, key
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    assert full == [0, 4, 8]
    assert text["swiglu_limits"][7:] == [7.0, 7.0, 0.0, 0.0, 0.0]
    assert text["swiglu_limits_shared"][7:] == [16.0, 16.0, 0.0, 0.0, 0.0]
    assert [layer.is_moe for layer in text_spec(config).layers] == [False] * 3 + [True] * 6 + [False] * 3


def test_linear_inputs_stay_multiples_of_32_on_two_ranks(tensors: dict[str, torch.Tensor]) -> None:
    row_parallel = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "c_proj.weight")
    for name, tensor in tensors.items():
        if tensor.ndim >= 2 and name.endswith(("proj.weight", "in_proj_weight", "output.weight", "c_fc.weight")):
            inputs = tensor.shape[-1] // (2 if name.endswith(row_parallel) else 1)
            assert inputs % 32 == 0, name


def test_transformers_loads_it_whole_and_computes_the_same_logits(made: tuple[Path, Path, TinyResult]) -> None:
    transformers = pytest.importorskip("transformers")
    path = made[0]
    theirs, loading = transformers.Step3p7ForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all(name.endswith(("k_scale", "v_scale")) for name in loading["unexpected_keys"])
    ids = held_out_tokens(path, 300)[None]  # longer than the window, and not a multiple of it
    ours = load_model(path)
    with torch.no_grad():
        difference = (theirs(input_ids=ids).logits - ours(ids)).abs().max()
        # 256 tokens take our blocked path through the window, 300 the masked one.
        blocked = (ours(ids[:, :256]) - ours(ids)[:, :256]).abs().max()
    assert float(difference) < 1e-4
    assert float(blocked) < 1e-4


def test_perplexity_of_an_untrained_model_is_about_the_vocabulary(made: tuple[Path, Path, TinyResult]) -> None:
    found = perplexity(load_model(made[0]), held_out_tokens(made[0], 400))
    assert 0.3 * VOCAB < found < 1.5 * VOCAB
    assert np.isfinite(made[2].held_out_perplexity)


def test_second_call_copies_the_cache(made: tuple[Path, Path, TinyResult], tmp_path: Path) -> None:
    _, cache, first = made
    second = make_tiny(tmp_path / "again", steps=STEPS, cache_dir=cache, progress=False)
    assert second.cached and not first.cached
    assert second.held_out_perplexity == first.held_out_perplexity
    names = sorted(p.name for p in (tmp_path / "again").iterdir())
    assert names == sorted(p.name for p in made[0].iterdir())
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]  # no temporary folder is left


def test_report_holds_the_loss_curve(made: tuple[Path, Path, TinyResult]) -> None:
    report = json.loads((made[0] / "tiny_report.json").read_text())
    assert len(report["loss_curve"]) == STEPS and len(report["loss_curve"][0]) == 4
    assert report["parameters"] == made[2].parameters > 1_000_000


def test_an_existing_folder_is_refused_before_any_work(made: tuple[Path, Path, TinyResult], tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    for force in (False, True):  # --force replaces only what this command made
        with pytest.raises(OutputExistsError, match="mine"):
            make_tiny(out, steps=STEPS, cache_dir=made[1], progress=False, force=force)
    assert (out / "notes.txt").read_text() == "keep me"


def test_command_line_exit_codes(
    made: tuple[Path, Path, TinyResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())

    def run(*arguments: str) -> int:
        args = parser.parse_args(["tiny", *arguments, "--steps", str(STEPS), "--cache-dir", str(made[1])])
        return int(args.run(args))

    out = tmp_path / "out"
    assert run(str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    assert run(str(out)) == 73
    assert "exists" in capsys.readouterr().err
    assert run(str(out), "--force") == 0
    assert "plumbing only" in capsys.readouterr().out
    if os.geteuid() != 0:
        assert run("/proc/nowhere/out") == 73


def test_an_unwritable_cache_is_known_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("step128_checkpoint.tiny.make._train_into", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("in the way")
    arguments = ["tiny", str(tmp_path / "out"), "--steps", "1", "--cache-dir", str(tmp_path / "file/cache")]
    assert main(arguments) == 73
    assert "cannot write" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
