"""Every check of the verification, on fabricated observations; and reading vLLM's log."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.plan import Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile
from step128_launcher.supervisor.load_report import LoadReport, read_load_reports
from step128_launcher.supervisor.verify import Check, Observation, Outcome, verify
from step128_launcher.supervisor.vllm_log import LogFollower, cause, phase_of, plugin_error, read_tail, remedy


@pytest.fixture
def plan(footprint: ModelFootprint, cpu_profile: Profile, make_machine: Callable[..., Hardware]) -> Plan:
    return make_plan(make_machine(), footprint, cpu_profile, Limits())


def metrics(plan: Plan, **changes: Any) -> str:
    labels = {
        "cache_dtype": plan.kv_cache_dtype,
        "num_gpu_blocks": plan.prediction.num_gpu_blocks,
        "kv_cache_size_tokens": plan.prediction.kv_cache_size_tokens,
    } | changes
    text = ",".join(f'{name}="{value}"' for name, value in labels.items())
    positions = "".join(
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{position}"}} 0.0\n'
        for position in range(plan.num_speculative_tokens)
    )
    if positions:
        positions = f"# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter\n{positions}"
    return f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{text}}} 1.0\n{positions}"


@pytest.fixture
def good(plan: Plan, footprint: ModelFootprint) -> Observation:
    def report(role: str) -> LoadReport:
        draft = role == "draft"
        return LoadReport(
            role=role,
            rank=0,
            plugin_version="0.1.0",
            quant_method="nl4",
            policy="all-linears",
            weight_path="torch",
            weight_order="checkpoint",
            attention_backend="CPU_ATTN",
            attention_path=None,
            quantized_modules={part.name: 1 for part in footprint.components if part.quantized and part.draft == draft},
            kv_cache_dtype="fp8",
            kv_scales={layer: (pair.k, pair.v) for layer, pair in (footprint.kv_scales or {}).items()},
            load_seconds=1.0,
        )

    model = {"id": "m", "max_model_len": plan.max_model_len}
    return Observation([report("target"), report("draft")], [], metrics(plan), model)


Change = Callable[[Observation, Plan], Observation]


def _target(**changes: Any) -> Change:
    return lambda seen, plan: replace(seen, reports=[replace(seen.reports[0], **changes), seen.reports[1]])


def _draft(**changes: Any) -> Change:
    return lambda seen, plan: replace(seen, reports=[seen.reports[0], replace(seen.reports[1], **changes)])


def test_all_pass(plan: Plan, footprint: ModelFootprint, good: Observation) -> None:
    checks = verify(plan, footprint, "m", good)
    assert [check.outcome for check in checks] == [Outcome.PASS] * 13
    assert len({check.name for check in checks}) == 13


CASES: dict[str, tuple[Change, str, Outcome, str]] = {
    "no reports": (
        lambda seen, plan: replace(seen, reports=[], report_problems=["x.json: broken"]),
        "plugin_loaded",
        Outcome.FAIL,
        "x.json: broken",
    ),
    "no draft": (
        lambda seen, plan: replace(seen, reports=seen.reports[:1]),
        "mtp",
        Outcome.FAIL,
        "depth 3 planned, 3 in effect, draft load reports of ranks []",
    ),
    "shallower draft": (
        lambda seen, plan: replace(seen, metrics=metrics(replace(plan, num_speculative_tokens=1))),
        "mtp",
        Outcome.FAIL,
        "depth 3 planned, 1 in effect",
    ),
    "other plugin version": (_draft(plugin_version="0.0.9"), "plugin_version", Outcome.FAIL, "0.0.9"),
    "not quantized": (_target(quant_method=None), "quantization", Outcome.FAIL, "nl4"),
    "other weight path": (_target(weight_path="triton"), "weight_path", Outcome.FAIL, "triton"),
    "other weight path of the draft": (
        _draft(weight_path="torch+triton"),
        "weight_path",
        Outcome.FAIL,
        "draft rank 0: path torch+triton, order checkpoint; expected path torch",
    ),
    "component lost": (
        _target(quantized_modules={"routed_experts": 3}),
        "quantized_components",
        Outcome.FAIL,
        "attention is not quantized on target rank 0",
    ),
    "draft component lost": (
        _draft(quantized_modules={"mtp_linears": 3, "mtp_heads": 0}),
        "quantized_components",
        Outcome.FAIL,
        "mtp_heads is not quantized on draft rank 0",
    ),
    "scale not in effect": (
        _target(kv_scales={0: (1.0, 1.0)}),
        "kv_scales",
        Outcome.FAIL,
        "layer 0, target rank 0: k 1 v 1 in effect, k 0.01 v 0.02 stored",
    ),
    "MTP scale missing": (_draft(kv_scales={}), "kv_scales_mtp", Outcome.FAIL, "layer 4, draft rank 0: no scale"),
    "other cache dtype": (
        lambda seen, plan: replace(seen, metrics=metrics(plan, cache_dtype="auto")),
        "cache_dtype",
        Outcome.FAIL,
        "found auto, expected fp8",
    ),
    "no cache metric": (
        lambda seen, plan: replace(seen, metrics="other 1.0\n"),
        "cache_dtype",
        Outcome.FAIL,
        "vllm:cache_config_info",
    ),
    "wrong prediction": (
        lambda seen, plan: replace(seen, metrics=metrics(plan, num_gpu_blocks=1)),
        "num_gpu_blocks",
        Outcome.WARN,
        "found 1, expected",
    ),
    "other context": (
        lambda seen, plan: replace(seen, model={"id": "m", "max_model_len": 8}),
        "max_model_len",
        Outcome.FAIL,
        "found 8, expected 4096",
    ),
    "other name": (
        lambda seen, plan: replace(seen, model={"id": "n", "max_model_len": 4096}),
        "model_name",
        Outcome.FAIL,
        "found n",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_difference_is_found(case: str, plan: Plan, footprint: ModelFootprint, good: Observation) -> None:
    change, name, outcome, text = CASES[case]
    found = {check.name: check for check in verify(plan, footprint, "m", change(good, plan))}
    assert found[name].outcome is outcome, found[name]
    assert text in found[name].detail


def weight_path_check(plan: Plan, footprint: ModelFootprint, seen: Observation) -> Check:
    return next(check for check in verify(plan, footprint, "m", seen) if check.name == "weight_path")


@pytest.mark.parametrize("change", [_target, _draft])
@pytest.mark.parametrize(
    ("path", "order"),
    [
        ("torch", "checkpoint"),
        ("torch", "kernel"),
        ("torch+triton", "checkpoint+kernel"),
        ("triton", None),
        (None, None),
    ],
)
def test_on_a_gpu_only_our_kernels_may_compute(
    change: Callable[..., Change],
    path: str | None,
    order: str | None,
    plan: Plan,
    footprint: ModelFootprint,
    good: Observation,
) -> None:
    gpu = replace(plan, device="rocm")
    right = [replace(report, weight_path="triton", weight_order="kernel") for report in good.reports]
    seen = replace(good, reports=right)
    assert weight_path_check(gpu, footprint, seen) == Check("weight_path", Outcome.PASS, "triton")
    wrong = weight_path_check(gpu, footprint, change(weight_path=path, weight_order=order)(seen, gpu))
    assert wrong.outcome is Outcome.FAIL
    assert f"path {path}, order {order}; expected path triton, order kernel." in wrong.detail
    assert "memory that the plan does not count" in wrong.detail


def attention_check(plan: Plan, footprint: ModelFootprint, seen: Observation) -> Check:
    return next(check for check in verify(plan, footprint, "m", seen) if check.name == "attention")


@pytest.mark.parametrize("change", [_target, _draft])
def test_the_attention_backend_that_is_named_must_serve(
    change: Callable[..., Change], plan: Plan, footprint: ModelFootprint, good: Observation
) -> None:
    """vLLM only logs that it takes another one; and ours must run its kernels. Another one's path is nobody's."""
    custom = replace(plan, device="rocm", attention_backend="CUSTOM")
    right = [replace(report, attention_backend="CUSTOM", attention_path="triton") for report in good.reports]
    seen = replace(good, reports=right)
    assert attention_check(custom, footprint, seen) == Check("attention", Outcome.PASS, "CUSTOM")
    wrong: tuple[tuple[str | None, str | None, str], ...]
    wrong = (
        ("TRITON_ATTN", None, "vLLM chose another backend"),
        ("CUSTOM", "torch", "slow torch reference computes on the GPU"),
        ("CUSTOM+TRITON_ATTN", "triton", "vLLM chose another backend"),
        (None, None, "does not say which backend serves: it is of an older plugin"),
    )
    for backend, path, meaning in wrong:
        changed = change(attention_backend=backend, attention_path=path)(seen, custom)
        found = attention_check(custom, footprint, changed)
        assert found.outcome is Outcome.FAIL
        assert f"{backend}, path {path}; expected CUSTOM, path triton. " in found.detail and meaning in found.detail
    other = replace(custom, attention_backend="TRITON_ATTN")
    theirs = [replace(report, attention_backend="TRITON_ATTN", attention_path=None) for report in good.reports]
    assert attention_check(other, footprint, replace(good, reports=theirs)).outcome is Outcome.PASS
    assert attention_check(other, footprint, seen).outcome is Outcome.FAIL
    assert attention_check(other, footprint, replace(good, reports=[])).outcome is Outcome.FAIL


def test_on_a_cpu_either_order_is_right(plan: Plan, footprint: ModelFootprint, good: Observation) -> None:
    for order in ("kernel", "checkpoint", None):
        check = weight_path_check(plan, footprint, _target(weight_order=order)(good, plan))
        assert check == Check("weight_path", Outcome.PASS, "torch")


@pytest.mark.parametrize("device", ["cpu", "rocm"])
def test_a_model_that_is_not_quantized_has_no_weight_path(
    device: str, plan: Plan, footprint: ModelFootprint, good: Observation
) -> None:
    on_device, plain = replace(plan, device=device), replace(footprint, quantization=None)
    none = [replace(report, weight_path=None, weight_order=None) for report in good.reports]
    assert weight_path_check(on_device, plain, replace(good, reports=none)).outcome is Outcome.PASS
    assert weight_path_check(on_device, plain, good).outcome is Outcome.FAIL
    parts = tuple(replace(part, quantized=part.quantized and not part.draft) for part in footprint.components)
    path = {"cpu": ("torch", "checkpoint"), "rocm": ("triton", "kernel")}[device]
    reports = [replace(good.reports[0], weight_path=path[0], weight_order=path[1]), none[1]]
    only_target = replace(footprint, components=parts)
    assert weight_path_check(on_device, only_target, replace(good, reports=reports)).outcome is Outcome.PASS


def test_draft_must_be_absent_when_mtp_is_off(plan: Plan, footprint: ModelFootprint, good: Observation) -> None:
    off = replace(plan, num_speculative_tokens=0)
    found = {check.name: check for check in verify(off, footprint, "m", good)}
    assert found["mtp"].outcome is Outcome.FAIL
    alone = replace(good, reports=good.reports[:1])
    found = {check.name: check for check in verify(off, footprint, "m", alone)}
    assert found["mtp"].outcome is Outcome.FAIL and "0 planned, 3 in effect" in found["mtp"].detail
    alone = replace(alone, metrics=metrics(off))
    found = {check.name: check for check in verify(off, footprint, "m", alone)}
    assert found["mtp"].outcome is Outcome.PASS and "kv_scales_mtp" not in found


@pytest.mark.parametrize(
    ("in_effect", "outcome"), [(1.0, Outcome.PASS), (1.0000001, Outcome.FAIL), (0.07, Outcome.FAIL)]
)
def test_mtp_layers_without_scales_must_be_at_one(
    in_effect: float, outcome: Outcome, plan: Plan, footprint: ModelFootprint, good: Observation
) -> None:
    trunk = {layer: pair for layer, pair in (footprint.kv_scales or {}).items() if layer < 4}
    seen = _draft(kv_scales=dict.fromkeys(range(4, 7), (in_effect, 1.0)))(good, plan)
    checks = verify(plan, replace(footprint, kv_scales=trunk), "m", seen)
    found = {check.name: check for check in checks}
    assert found["kv_scales"].outcome is Outcome.PASS
    assert found["kv_scales_mtp"].outcome is outcome, found["kv_scales_mtp"]


def test_unreadable_load_reports_are_named(tmp_path: Path) -> None:
    (tmp_path / "target-rank0.json").write_text("{")
    (tmp_path / "draft-rank0.json").write_text('{"schema": 2}')
    reports, problems = read_load_reports(tmp_path)
    assert reports == [] and len(problems) == 2 and "schema 2" in problems[0]


LOG = """\x1b[36m(APIServer pid=1)\x1b[0;0m INFO 11-23 16:30:00 [api_server.py:1] vLLM API server version 0.32.0
(EngineCore pid=2) ERROR 11-23 16:30:01 [core.py:2] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-23 16:30:01 [core.py:2]   File "x.py", line 1, in f
(EngineCore pid=2) ERROR 11-23 16:30:01 [core.py:2] ValueError: To serve at least one request
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_is_not_the_consequence(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text(LOG)
    lines = read_tail(path)
    assert cause(lines)[0] == "ValueError: To serve at least one request"
    assert plugin_error(lines) is None
    assert cause(["just", "", "text"]) == ["just", "text"]
    detailed = ["pydantic.ValidationError: 1 error", "  Value error, too long", "INFO: Shutting down"]
    assert cause(detailed) == ["pydantic.ValidationError: 1 error", "Value error, too long"]
    dead = ["Worker proc VllmWorker-1 died unexpectedly, shutting down.", "RuntimeError: Executor failed."]
    assert cause(dead) == dead[:1]
    assert read_tail(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line",
    ["step128: bad tensor", "ValueError: step128: bad tensor", "x.y.CheckpointMismatchError: step128: bad tensor"],
)
def test_the_plugins_complaint(line: str) -> None:
    assert plugin_error(["INFO something about step128: no complaint", line]) == "bad tensor"


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: operator torchvision::nms does not exist",
        "OSError: libc10_cuda.so: cannot open shared object file: No such file or directory",
    ],
)
def test_known_causes_have_a_remedy(line: str) -> None:
    assert "python -m step128_kernels.cpu_environment" in str(remedy(["other", line]))
    assert remedy(["other"]) is None


def test_phases() -> None:
    assert phase_of("INFO Loading weights took 3 seconds") == "weights loaded"
    assert phase_of("INFO nothing special") is None


def test_following_a_log_keeps_unfinished_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = LogFollower(path)
    assert follower.new_lines() == []
    path.write_text("one\ntw")
    assert follower.new_lines() == ["one"]
    path.write_text("one\ntwo\n")
    assert follower.new_lines() == ["two"]
