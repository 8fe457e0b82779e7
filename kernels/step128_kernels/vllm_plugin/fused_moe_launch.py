"""How vLLM 0.32 launches its Triton kernel for unquantized experts, without expert parallelism.

The same arguments as `invoke_fused_moe_triton_kernel` and `_prepare_expert_assignment` make; a test holds them against
those. Here they need no tensor and no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from step128_kernels.launch import Launch, Pointer
from step128_kernels.tuned.schema import Config
from step128_kernels.vllm_plugin.offline_triton import visible_triton

ELEMENT_BYTES = 2  # of a bfloat16
_NAIVE_FACTOR = 4  # vLLM aligns nothing while four times the pairs are no more than the experts


@dataclass(frozen=True)
class Call:
    """One call for `rows` tokens whose experts are chosen as evenly as can be."""

    rows: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int

    @property
    def pairs(self) -> int:
        """Pairs of token and chosen expert; pair p goes to expert p modulo the number of active ones."""
        return self.rows * self.top_k

    @property
    def active(self) -> int:
        """Experts that have a token."""
        return min(self.pairs, self.experts)

    @property
    def naive(self) -> bool:
        """Whether each pair has a block of its own."""
        return self.pairs * _NAIVE_FACTOR <= self.experts

    def sorted_pairs(self, block: int) -> list[int]:
        """Pairs by expert, padded to blocks with the number of pairs, up to the length vLLM reserves."""
        found: list[int] = []
        for expert in range(self.active):
            own = list(range(expert, self.pairs, self.active))
            found += own + [self.pairs] * (-len(own) % block)
        reserved = self.pairs + self.experts * (block - 1)
        if self.pairs < self.experts:
            reserved = min(self.pairs * block, reserved)
        return found + [self.pairs] * (reserved - len(found))

    def padded_pairs(self, block: int) -> int:
        """Length of the sorted pairs that blocks work on."""
        if self.naive:
            return self.pairs * block
        return sum(-(-len(range(one, self.pairs, self.active)) // block) * block for one in range(self.active))

    def block_experts(self, block: int) -> list[int]:
        """Expert of each block; the blocks that are reserved and not used have none."""
        if self.naive:
            return [pair % self.active for pair in range(self.pairs)]
        return [pair % self.active if pair < self.pairs else -1 for pair in self.sorted_pairs(block)[::block]]


def gate_up_launch(call: Call, config: Config) -> Launch:
    """Launch of gate and up: ``[pairs, 2 * intermediate]``."""
    return _launch("vllm_fused_moe_gate_up", call, config, call.rows, call.top_k, 2 * call.intermediate, call.hidden)


def down_launch(call: Call, config: Config) -> Launch:
    """Launch of down with the routing weight: ``[pairs, hidden]``."""
    return _launch("vllm_fused_moe_down", call, config, call.pairs, 1, call.hidden, call.intermediate)


def _launch(name: str, call: Call, config: Config, a_rows: int, top_k: int, n: int, k: int) -> Launch:
    import triton.language as tl

    block = config["BLOCK_SIZE_M"]
    weighted = top_k == 1
    owners = call.block_experts(block)
    padded = call.padded_pairs(block)
    reserved = padded if call.naive else len(call.sorted_pairs(block))
    em = reserved
    if not call.naive and a_rows < block:
        em = min(reserved, a_rows * top_k * block)
    pointers = {
        "a_ptr": Pointer("bf16", a_rows * k * ELEMENT_BYTES),
        "b_ptr": Pointer("bf16", call.experts * n * k * ELEMENT_BYTES),
        "c_ptr": Pointer("bf16", call.pairs * n * ELEMENT_BYTES),
        "expert_ids_ptr": Pointer("i32", 4 * len(owners)),
        "num_tokens_post_padded_ptr": Pointer("i32", 4),
    }
    constants: dict[str, Any] = dict.fromkeys(("b_bias_ptr", "a_scale_ptr", "b_scale_ptr"))
    for optional, needed, pointer in (
        ("topk_weights_ptr", weighted, Pointer("fp32", 4 * call.pairs)),
        ("sorted_token_ids_ptr", not call.naive, Pointer("i32", 4 * reserved)),
    ):
        if needed:
            pointers[optional] = pointer
        else:
            constants[optional] = None
    return Launch(
        name=name,
        function=_kernel(),
        pointers=pointers,
        scalars={
            **{"N": n, "K": k, "EM": em, "num_valid_tokens": call.pairs},
            **{"stride_am": k, "stride_ak": 1, "stride_be": n * k, "stride_bk": 1, "stride_bn": k},
            **{"stride_cm": n, "stride_cn": 1, "stride_asm": 0, "stride_ask": 0},
            **{"stride_bse": 0, "stride_bsk": 0, "stride_bsn": 0, "stride_bbe": 0, "stride_bbn": 0},
        },
        constants={
            **constants,
            **{"group_n": 0, "group_k": 0, "naive_block_assignment": call.naive, "MUL_ROUTED_WEIGHT": weighted},
            **{"top_k": top_k, "compute_type": tl.bfloat16, "per_channel_quant": False, "HAS_BIAS": False},
            **{"use_fp8_w8a8": False, "use_int8_w8a8": False, "use_int8_w8a16": False},
            **{"SWAP_AB": False, "USE_TD": False},
            **{key: value for key, value in config.items() if key.isupper()},
        },
        grid=(-(-em // block) * -(-n // config["BLOCK_SIZE_N"]), 1, 1),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        # Which expert it is decides no branch, and blocks that have none end before they look.
        loads={"expert_ids_ptr": 0, "num_tokens_post_padded_ptr": padded},
    )


@cache
def _kernel() -> Any:
    with visible_triton():
        from vllm.model_executor.layers.fused_moe import fused_moe
    return fused_moe.fused_moe_kernel
