"""The doctor's checks of a checkpoint: what it lacks that a server would only show as bad answers or a failed start."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from step128_launcher.doctor import checkpoint as model_checks
from step128_launcher.doctor import fit
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe
from step128_launcher.model.checkpoint import read_footprint
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.quantization import Format
from step128_launcher.planning.profiles import Profile

MACHINES = Path(__file__).parents[2] / "machines"
GIB = 2**30
QUAD, STRIX = "quad-r9700", "strix-halo-128-gtt120"
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
    ):
        assert check(context).outcome == "PASS", check(context)


def test_a_checkpoint_that_lacks_things(
    make_checkpoint: Callable[..., Path], nl4_format: Format, configs_dir: Path
) -> None:
    context = with_model(make_checkpoint(kv_scales=False, mtp=False), nl4_format, configs_dir)
    assert model_checks.check_kv_scales(context).outcome == "WARN"
    assert model_checks.check_mtp(context).outcome == "WARN"
    assert model_checks.check_chat_template(context).outcome == "FAIL"


@pytest.mark.parametrize(("found", "outcome"), [(3, "PASS"), (2, "WARN"), (1, "WARN"), (0, "WARN")])
def test_mtp_layers_as_many_as_announced(
    make_checkpoint: Callable[..., Path], nl4_format: Format, configs_dir: Path, found: int, outcome: str
) -> None:
    context = with_model(make_checkpoint(), nl4_format, configs_dir)
    assert context.footprint is not None and context.footprint.config.num_mtp_layers == 3
    finding = model_checks.check_mtp(replace(context, footprint=replace(context.footprint, mtp_layers=found)))
    assert finding.outcome == outcome, finding


def planned(
    tree: str,
    footprint: ModelFootprint,
    form: Format,
    profile: Profile,
    configs_dir: Path,
    available: int | None = None,
) -> Context:
    hardware = probe(MACHINES / tree, {})
    if available is not None:
        hardware = replace(hardware, memory_available_bytes=available)
    context = Context(hardware, {}, profile, MACHINES / tree, configs_dir, footprint.path, footprint)
    return fit.with_plan(context, form)


def test_the_planner_says_whether_it_fits(
    real_model: Callable[[str | None], ModelFootprint],
    profile_of: Callable[[str], Profile],
    nl4_format: Format,
    configs_dir: Path,
) -> None:
    quad = profile_of("quad-r9700")
    context = planned(QUAD, real_model("all-linears"), nl4_format, quad, configs_dir)
    found = fit.check_model_fits(context)
    assert found.outcome == "PASS" and "4 ranks" in found.evidence, found
    share = fit.check_utilization(context)
    assert context.plan is not None and f"{context.plan.gpu_memory_utilization:.2f}" in share.evidence
    refused = planned(QUAD, real_model(None), nl4_format, quad, configs_dir)
    found = fit.check_model_fits(refused)
    assert found.outcome == "FAIL" and refused.refusal is not None, found
    assert found.evidence == refused.refusal.message and found.remedy == refused.refusal.hint
    assert fit.check_model_fits(replace(context, plan=None, refusal=None)).outcome == "SKIP"
    assert fit.check_model_fits(replace(context, footprint=None)).outcome == "SKIP"


def test_weights_below_the_memory_may_still_not_fit(
    real_model: Callable[[str | None], ModelFootprint],
    profile_of: Callable[[str], Profile],
    nl4_format: Format,
    configs_dir: Path,
) -> None:
    """The stored bytes are less than the cards' memory: a comparison of the two alone would let this pass."""
    footprint = real_model("all-linears")
    profile = profile_of("quad-r9700")
    room = sum(gpu.vram_total_bytes or 0 for gpu in probe(MACHINES / QUAD, {}).gpus)
    assert footprint.stored_bytes < room
    found = fit.check_model_fits(
        planned(QUAD, footprint, nl4_format, replace(profile, usable_fraction=0.8), configs_dir)
    )
    assert found.outcome == "FAIL" and found.remedy, found


def test_a_plan_too_near_the_end_of_the_memory(
    real_model: Callable[[str | None], ModelFootprint],
    profile_of: Callable[[str], Profile],
    nl4_format: Format,
    configs_dir: Path,
) -> None:
    context = planned(QUAD, real_model("all-linears"), nl4_format, profile_of("quad-r9700"), configs_dir)
    assert context.plan is not None
    near = replace(context, plan=replace(context.plan, gpu_memory_utilization=0.98))
    found = fit.check_utilization(near)
    assert found.outcome == "WARN" and "0.98" in found.evidence, found


def test_memory_that_others_hold(
    real_model: Callable[[str | None], ModelFootprint],
    profile_of: Callable[[str], Profile],
    nl4_format: Format,
    configs_dir: Path,
) -> None:
    strix = profile_of("strix-halo-128")
    model = real_model("all-linears")
    context = planned(STRIX, model, nl4_format, strix, configs_dir)
    found = fit.check_host_memory(context)
    assert found.outcome == "PASS" and "the plan needs" in found.evidence, found
    found = fit.check_host_memory(planned(STRIX, model, nl4_format, strix, configs_dir, available=60 * GIB))
    assert found.outcome == "FAIL" and "the weights alone need" in found.evidence, found


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
