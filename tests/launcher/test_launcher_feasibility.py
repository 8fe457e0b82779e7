"""What fits where at the real size: the machines of tests/machines, the 240-expert model, every policy.

The table is of a study of vLLM 0.32's code on this model's config.json (GiB a GPU, 204800 tokens, MTP 3, two decimals);
what it assumes of a GPU (driver context, graphs) is assumed here too, so only weights, KV cache and activations are
compared figure by figure.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from step128_launcher.errors import ExitCode
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.model.quantization import Format
from step128_launcher.planning.items import Load
from step128_launcher.planning.kv_cache import kv_shape
from step128_launcher.planning.memory import Ledger
from step128_launcher.planning.plan import DoesNotFitError, Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile

GIB = 2**30
FULL = Limits(max_model_len=204800, num_speculative_tokens=3)
Recorded = Callable[[str], Hardware]
ProfileOf = Callable[[str], Profile]
RealModel = Callable[[str | None], ModelFootprint]
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan_for(recorded: Recorded, profile_of: ProfileOf, real_model: RealModel, nl4_format: Format) -> MakePlan:
    """Plan for a recorded machine (or a changed one), a profile, a policy."""

    def plan(machine: str | Hardware, profile: str, policy: str, limits: Limits = FULL) -> Plan:
        hardware = recorded(machine) if isinstance(machine, str) else machine
        return make_plan(hardware, real_model(policy), profile_of(profile), limits, form=nl4_format)

    return plan


# Ranks, policy, images, bytes of a KV element -> weights with rope tables, KV cache, activations.
TABLE = {
    (4, "experts", True, 1): (28.96, 1.25, 1.17),
    (4, "experts+linears", True, 1): (27.17, 1.25, 1.17),
    (4, "experts+linears", False, 1): (25.90, 1.25, 0.44),
    (4, "all-linears", True, 1): (26.13, 1.25, 1.17),
    (4, "all-linears", False, 1): (24.86, 1.25, 0.44),
    (4, "all", True, 1): (25.40, 1.25, 1.17),
    (4, "all-linears", True, 2): (26.13, 2.50, 1.17),
    (1, "experts+linears", True, 1): (106.0, 5.01, 2.92),
    (1, "all-linears", True, 1): (102.3, 5.01, 2.92),
    (1, "all-linears", False, 1): (98.5, 5.01, 0.44),
    (1, "all", True, 1): (99.3, 5.01, 2.92),
}


@pytest.mark.parametrize("row", TABLE)
def test_the_table_s_figures(row: tuple[int, str, bool, int], real_model: RealModel, profile_of: ProfileOf) -> None:
    ranks, policy, vision, element = row
    footprint = real_model(policy)
    load = Load("bfloat16", ranks, 3, 16, 2048, vision, "TRITON_ATTN", False, False)
    profile = profile_of("quad-r9700" if ranks == 4 else "strix-halo-128")
    lines = {line.name: line.total_bytes for line in Ledger(footprint, profile).lines(load)}
    weights = sum(size for name, size in lines.items() if name.startswith(("weights:", "draft:", "rope tables")))
    shape = kv_shape(
        footprint.config,
        mtp_layers=3,
        num_speculative_tokens=3,
        tensor_parallel_size=ranks,
        bytes_per_element=element,
        block_size_tokens=16,
        max_num_batched_tokens=2048,
        concurrent_batches=2,
    )
    # The table's text activations include the logits; with images the tower's peak is the higher one.
    activations = lines["activations"] + (0 if vision else lines["logits"])
    found = tuple(size / GIB for size in (weights, shape.needed_bytes(204800), activations))
    assert found == pytest.approx(TABLE[row], rel=0.01, abs=0.005)


@pytest.mark.parametrize("tokens", [1024, 2048, 16384])
@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_activations_hold_what_our_experts_kernels_need(
    ranks: int, expert_parallel: bool, tokens: int, real_model: RealModel, profile_of: ProfileOf
) -> None:
    """A full batch in bfloat16; the few tokens whose partial results are float32 need far less."""
    footprint = real_model("all-linears")
    hidden, top_k = footprint.config.hidden_size, footprint.config.experts_per_token
    intermediate = 1280 if expert_parallel else 1280 // ranks

    def scratch_bytes(tokens: int, partial_bytes: int) -> int:
        """SwiGLU's results and the partial ones, for each pair of token and expert; two rows a token."""
        return tokens * (top_k * (2 * intermediate + partial_bytes * hidden) + 2 * 2 * hidden)

    load = Load("bfloat16", ranks, 0, 1, tokens, False, "TRITON_ATTN", expert_parallel, False)
    lines = {line.name: line.total_bytes for line in Ledger(footprint, profile_of("quad-r9700")).lines(load)}
    assert scratch_bytes(32, 4) < scratch_bytes(tokens, 2) < lines["activations"] == tokens * hidden * 22 * 2


# Machine, policy, images, KV dtype -> whether 204800 tokens with MTP 3 fit.
VERDICTS = {
    ("quad-r9700", "experts", True, "fp8"): False,
    ("quad-r9700", "experts", False, "fp8"): False,
    ("quad-r9700", "experts+linears", True, "fp8"): False,
    ("quad-r9700", "experts+linears", False, "fp8"): True,
    ("quad-r9700", "all-linears", True, "fp8"): True,
    ("quad-r9700", "all-linears", False, "fp8"): True,
    ("quad-r9700", "all", True, "fp8"): True,
    ("quad-r9700", "all-linears", True, "auto"): False,
    ("quad-r9700", "all-linears", False, "auto"): True,
    ("strix-halo-128-gtt120", "all-linears", True, "fp8"): True,
    ("strix-halo-128-gtt120", "all-linears", False, "fp8"): True,
    ("strix-halo-128-gtt120", "all", True, "fp8"): True,
    ("strix-halo-128-default", "all", False, "fp8"): False,
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_table_s_verdicts(case: tuple[str, str, bool, str], plan_for: MakePlan) -> None:
    machine, policy, vision, kv_dtype = case
    limits = replace(FULL, vision=vision, kv_cache_dtype=kv_dtype)
    profile = "quad-r9700" if machine == "quad-r9700" else "strix-halo-128"
    if not VERDICTS[case]:
        with pytest.raises(DoesNotFitError, match="missing") as caught:
            plan_for(machine, profile, policy, limits)
        assert caught.value.exit_code == ExitCode.DOES_NOT_FIT and caught.value.memory.free_bytes < 0
        return
    plan = plan_for(machine, profile, policy, limits)
    settings = (plan.max_model_len, plan.num_speculative_tokens, plan.vision, plan.kv_cache_dtype)
    assert settings == (204800, 3, vision, kv_dtype)
    assert plan.prediction.kv_cache_max_concurrency >= 1 and plan.memory.free_bytes >= 0


def test_experts_alone_leave_no_room_for_images(plan_for: MakePlan) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan_for("quad-r9700", "quad-r9700", "experts", Limits(vision=True))
    for remedy in ("--no-vision (fits", "policy experts+linears: +", "policy all-linears: +", "policy all: +"):
        assert remedy in caught.value.hint
    plan = plan_for("quad-r9700", "quad-r9700", "experts", Limits())
    assert not plan.vision and plan.tensor_parallel_size == 4
    assert "Text only: images would cost context or MTP depth (see below)." in plan.reasons
    images = next(item for item in plan.rejected if item.wish == "images (vision tower)")
    assert images.missing_bytes and "missing (each of 4 GPUs)" in images.reason


def test_the_wish_names_what_is_missing_and_what_would_do(plan_for: MakePlan) -> None:
    plan = plan_for("quad-r9700", "quad-r9700", "experts+linears", FULL)
    assert not plan.vision  # what was planned instead
    (wish,) = plan.wish
    assert wish.startswith("Wished: images, context 204800, MTP 3, KV fp8: ") and "MiB missing (each of 4 GPUs)" in wish
    # Without images: the tower, its tables, and the peak of the largest image above that of 512 tokens.
    tower, tables, image, text = 1.227, 0.045, 1.170, 0.086
    freed = re.search(r"text only \(--no-vision\): \+(\d\.\d\d) GiB", wish)
    assert freed and float(freed[1]) == pytest.approx(tower + tables + image - text, abs=0.01)
    assert "policy all-linears: +935.7 MiB a rank" in wish and "policy all: +" in wish
    assert plan_for("quad-r9700", "quad-r9700", "all-linears").wish == ()
    with pytest.raises(DoesNotFitError, match=r"\d+\.\d MiB missing") as caught:
        plan_for("quad-r9700", "quad-r9700", "experts+linears", replace(FULL, vision=True))
    assert "--no-vision (fits" in caught.value.hint and "policy all-linears: +" in caught.value.hint


@pytest.mark.parametrize(
    ("machine", "wanted", "unwanted"),
    [
        ("strix-halo-128-default", ["raise GTT to 120 GiB: `sudo amd-ttm --set 120`"], "container"),
        ("strix-halo-128-carveout96", ["carve-out to 512 MiB (now 96.00 GiB), then raise GTT to "], "container"),
        ("strix-halo-lxc", ["raise the container's memory limit (now 64.00 GiB) by "], "amd-ttm"),
    ],
)
def test_strix_halo_s_remedies(machine: str, wanted: list[str], unwanted: str, plan_for: MakePlan) -> None:
    with pytest.raises(DoesNotFitError, match="GiB missing") as caught:
        plan_for(machine, "strix-halo-128", "all-linears", Limits())
    for text in wanted:
        assert text in caught.value.hint
    assert unwanted not in caught.value.hint


def test_no_limit_is_to_be_raised_above_the_machine(plan_for: MakePlan) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan_for("container-6gib", "cpu", "all-linears", Limits())
    assert "a machine with more memory" in caught.value.hint and "limit" not in caught.value.hint


@pytest.mark.parametrize(("used", "helps"), [(2, False), (6, True)])
def test_other_users_of_the_gpus(used: int, helps: bool, plan_for: MakePlan, recorded: Recorded) -> None:
    """Ending them is only proposed if the memory they hold is enough."""
    hardware = recorded("quad-r9700")
    busy = replace(hardware, gpus=tuple(replace(gpu, vram_used_bytes=used * GIB) for gpu in hardware.gpus))
    policy = "all-linears" if helps else "experts+linears"
    with pytest.raises(DoesNotFitError) as caught:
        plan_for(busy, "quad-r9700", policy, replace(FULL, vision=True))
    assert (f"end what holds {used}.00 GiB of the GPU's memory" in caught.value.hint) == helps


def test_the_remedies_work(plan_for: MakePlan, recorded: Recorded) -> None:
    """GTT raised as told, and the container's limit: then it is planned."""
    default = recorded("strix-halo-128-default")
    gpus = tuple(replace(gpu, gtt_total_bytes=120 * GIB) for gpu in default.gpus)
    limits = tuple(replace(limit, limit_bytes=120 * GIB) for limit in default.ttm_limits)
    raised = plan_for(replace(default, gpus=gpus, ttm_limits=limits), "strix-halo-128", "all-linears", Limits())
    assert raised.max_model_len >= 32768
    container = recorded("strix-halo-lxc")
    with pytest.raises(DoesNotFitError) as caught:
        plan_for(container, "strix-halo-128", "all-linears", Limits())
    named = re.search(r"memory limit \(now 64.00 GiB\) by (\d+\.\d\d) GiB", caught.value.hint)
    assert named
    added = int((float(named[1]) + 0.005) * GIB)  # two decimals are printed
    larger = replace(container, memory_available_bytes=container.memory_available_bytes + added)
    assert plan_for(larger, "strix-halo-128", "all-linears", Limits()).max_model_len >= 32768


@pytest.mark.parametrize("machine", ["single-r9700", "r9700-plus-igpu"])
def test_one_card_refuses_kindly(machine: str, plan_for: MakePlan) -> None:
    with pytest.raises(DoesNotFitError, match=r"30\.27 GiB may be used") as caught:
        plan_for(machine, "single-r9700", "all-linears", Limits())
    assert "four such cards (profile quad-r9700)" in caught.value.hint and "Nothing is offloaded" in caught.value.hint
    assert caught.value.memory.where == "the GPU's VRAM"


@pytest.mark.parametrize("machine", ["quad-48gb", "dgx-spark", "jetson-thor"])
def test_other_machines_run_it(machine: str, plan_for: MakePlan) -> None:
    plan = plan_for(machine, machine, "all-linears", Limits())
    assert (plan.max_model_len, plan.num_speculative_tokens, plan.kv_cache_dtype) == (204800, 3, "fp8")
    # The unified machines keep context and MTP, and give up images; they say what would bring them back.
    assert plan.vision == (machine == "quad-48gb") and bool(plan.wish) != plan.vision
    assert plan.host_memory is not None and plan.host_memory.free_bytes >= 0
    shared = any(line.name == "model and KV cache" for line in plan.host_memory.lines)
    assert shared == (machine != "quad-48gb")


def test_no_gpu_refuses_the_big_model(plan_for: MakePlan) -> None:
    with pytest.raises(DoesNotFitError, match="of host memory") as caught:
        plan_for("no-gpu", "cpu", "all-linears", Limits())
    assert "a machine with more memory (this one has 23.54 GiB)" in caught.value.hint


def test_no_integrated_gpu_takes_part(plan_for: MakePlan, recorded: Recorded) -> None:
    hardware = recorded("r9700-plus-igpu")
    card = next(gpu for gpu in hardware.gpus if not gpu.integrated)
    room = replace(card, vram_total_bytes=120 * GIB)
    roomy = replace(hardware, gpus=tuple(room if gpu is card else gpu for gpu in hardware.gpus))
    plan = plan_for(roomy, "single-r9700", "all-linears", Limits())
    assert plan.gpu_addresses == (card.pci_address,) and plan.tensor_parallel_size == 1
    assert plan.memory.total_memory_bytes == 120 * GIB
    # In the order of HIP, which is the compute driver's; on a machine without another GPU nothing is hidden.
    assert ("HIP_VISIBLE_DEVICES", "0") in plan.environment
    alone = plan_for("quad-r9700", "quad-r9700", "all-linears")
    assert not any(name.endswith("VISIBLE_DEVICES") for name, _ in alone.environment)


def test_the_source_of_the_weights_is_told(plan_for: MakePlan) -> None:
    weights = [line for line in plan_for("quad-r9700", "quad-r9700", "all").memory.lines if "weights:" in line.name]
    assert weights and {(line.evidence, line.source) for line in weights} == {
        ("computed", "config.json and the policy")  # no shard was read
    }
