"""The doctor's checks of a checkpoint: what it lacks that a server would only show as bad answers or a failed start."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from step128_launcher.doctor import checkpoint as model_checks
from step128_launcher.doctor import memory
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe
from step128_launcher.model.checkpoint import read_footprint
from step128_launcher.model.quantization import Format

MACHINES = Path(__file__).parents[1] / "machines"
GIB = 2**30
QUAD = "quad-r9700"
TEMPLATE = "{% if m.role == 'tool' %}<tool_response>{% endif %}{% if m.content is string %}{{ m.content }}{% endif %}"


def with_model(folder: Path, form: Format, configs_dir: Path, tree: str = QUAD) -> Context:
    footprint = read_footprint(folder, form)
    return Context(probe(MACHINES / tree, {}), {}, None, MACHINES / tree, configs_dir, folder, footprint)


def test_a_good_checkpoint(make_checkpoint: Callable[..., Path], nl4_format: Format, configs_dir: Path) -> None:
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    context = with_model(folder, nl4_format, configs_dir)
    for check in (
        model_checks.check_checkpoint,
        model_checks.check_chat_template,
        model_checks.check_kv_scales,
        model_checks.check_mtp,
        memory.check_model_fits,
    ):
        assert check(context).outcome == "PASS", check(context)


def test_a_checkpoint_that_lacks_things(
    make_checkpoint: Callable[..., Path], nl4_format: Format, configs_dir: Path
) -> None:
    context = with_model(make_checkpoint(kv_scales=False, mtp=False), nl4_format, configs_dir)
    assert model_checks.check_kv_scales(context).outcome == "WARN"
    assert model_checks.check_mtp(context).outcome == "WARN"
    assert model_checks.check_chat_template(context).outcome == "FAIL"
    huge = replace(context.footprint, stored_bytes=200 * GIB) if context.footprint else None
    found = memory.check_model_fits(replace(context, footprint=huge))
    assert found.outcome == "FAIL" and "127.44 GiB" in found.evidence


@pytest.mark.parametrize(
    ("file", "text", "outcome", "word"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE}), "PASS", ""),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]}),
            "PASS",
            "",
        ),
        ("tokenizer_config.json", "{", "FAIL", "no chat_template"),
        ("tokenizer_config.json", "[]", "FAIL", "no chat_template"),
        ("chat_template.jinja", "{{ m.content }}", "WARN", "tool results (role 'tool') and of content"),
        ("chat_template.jinja", TEMPLATE.partition("{% if m.content")[0], "WARN", "list of parts"),
    ],
)
def test_chat_templates(tmp_path: Path, file: str, text: str, outcome: str, word: str) -> None:
    (tmp_path / file).write_text(text)
    found = model_checks.check_chat_template(
        Context(probe(MACHINES / QUAD, {}), {}, None, MACHINES / QUAD, tmp_path, tmp_path)
    )
    assert found.outcome == outcome and word in found.evidence


def test_tuned_configuration_by_its_exact_name(
    make_checkpoint: Callable[..., Path], nl4_format: Format, tmp_path: Path
) -> None:
    """The checkpoint has 4 experts of 32 columns, so a rank of four has N=8."""
    context = with_model(make_checkpoint(), nl4_format, tmp_path / "configs")
    tuned = tmp_path / "configs/tuned"
    tuned.mkdir(parents=True)
    found = model_checks.check_tuned_config(context)
    assert found.outcome == "WARN" and "E=4,N=8,device_name=AMD_Radeon_AI_PRO_R9700" in found.evidence
    (tuned / "E=4,N=16,device_name=AMD_Radeon_R9700.json").touch()
    assert model_checks.check_tuned_config(context).outcome == "WARN"
    (tuned / "E=4,N=8,device_name=AMD_Radeon_R9700,dtype=fp8_w8a8.json").touch()
    assert model_checks.check_tuned_config(context).outcome == "PASS"
    (tuned / "E=4,N=8,device_name=<MagicMock id='1'>.json").touch()
    assert "Mock" in model_checks.check_tuned_config(context).evidence


def test_uncalibrated_scales(make_checkpoint: Callable[..., Path], nl4_format: Format, configs_dir: Path) -> None:
    context = with_model(make_checkpoint(), nl4_format, configs_dir)
    assert context.footprint is not None and context.footprint.kv_scales is not None
    scales = context.footprint.kv_scales
    trunk = {layer: scale for layer, scale in scales.items() if layer < 4}
    found = model_checks.check_kv_scales(replace(context, footprint=replace(context.footprint, kv_scales=trunk)))
    assert found.outcome == "WARN" and "4, 5, 6" in found.evidence
    unit = {layer: replace(scale, k=1.0, v=1.0) for layer, scale in scales.items()}
    found = model_checks.check_kv_scales(replace(context, footprint=replace(context.footprint, kv_scales=unit)))
    assert found.outcome == "WARN" and "nothing was calibrated" in found.evidence
