"""How NL4 experts are launched: the one place that turns a shape, a config and a routing into kernel arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from step128_kernels.launch import Launch, Pointer
from step128_kernels.nl4_arguments import ELEMENT_BYTES, check_element, even, num_options, weight_pointers
from step128_kernels.nl4_moe.align import LARGEST_ALIGNED_PAIRS, most_blocks, nl4_moe_align_kernel
from step128_kernels.nl4_moe.decode import nl4_moe_down_decode_kernel, nl4_moe_gate_up_decode_kernel
from step128_kernels.nl4_moe.epilogue import nl4_moe_combine_kernel
from step128_kernels.nl4_moe.prefill import nl4_moe_down_prefill_kernel, nl4_moe_gate_up_prefill_kernel

Config = Mapping[str, int | str]

_COMBINE_COLUMNS = 512
_COMBINE_WARPS = 4
_ALIGN_CHUNK = 32


@dataclass(frozen=True)
class MoeShape:
    """One call of the routed experts.

    Attributes:
        tokens: rows of the activations.
        top_k: experts chosen per token.
        experts: experts on this rank.
        hidden: the model's hidden size.
        intermediate: an expert's intermediate size on this rank, a multiple of 16.
        has_map: some experts live on other ranks.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    has_map: bool = False

    @property
    def pairs(self) -> int:
        """Pairs of token and chosen expert."""
        return self.tokens * self.top_k


def one_pair_blocks(shape: MoeShape, config: Config) -> bool:
    """Whether every pair is its own block, so that nothing needs to be aligned."""
    return config["phase"] == "decode" and config["BLOCK_M"] == 1 and not shape.has_map


def needs_sorting(shape: MoeShape) -> bool:
    """Whether there are more pairs than the align kernel takes."""
    return shape.pairs > LARGEST_ALIGNED_PAIRS


def block_count(shape: MoeShape, config: Config) -> int:
    """Blocks that the expert kernels are launched for."""
    if one_pair_blocks(shape, config) or not needs_sorting(shape):
        return shape.pairs
    return most_blocks(shape.pairs, int(config["BLOCK_M"]), shape.experts)


def needs_aligning(shape: MoeShape, config: Config) -> bool:
    """Whether the align kernel makes the blocks: neither are they the pairs themselves, nor are there too many."""
    return not one_pair_blocks(shape, config) and not needs_sorting(shape)


def moe_launches(shape: MoeShape, config: Config, limit: float | None, element: str, amd: bool) -> tuple[Launch, ...]:
    """All launches of one call, in order; pairs that are sorted instead of aligned are torch's work, not among them."""
    align = (align_launch(shape, config),) if needs_aligning(shape, config) else ()
    return (
        *align,
        gate_up_launch(shape, config, limit, element, amd),
        down_launch(shape, config, element, amd),
        combine_launch(shape, config, element),
    )


def align_launch(shape: MoeShape, config: Config) -> Launch:
    """Launch of the align kernel, for up to LARGEST_ALIGNED_PAIRS pairs."""
    padded = max(_ALIGN_CHUNK, 1 << (shape.pairs - 1).bit_length())
    return Launch(
        name="nl4_moe_align",
        function=nl4_moe_align_kernel,
        pointers={
            "topk_ids_ptr": Pointer("i32", 4 * shape.pairs),
            "expert_map_ptr": Pointer("i32", 4 * shape.experts),
            "experts_ptr": Pointer("i32", 4 * shape.pairs),
            "pairs_ptr": Pointer("i32", 4 * shape.pairs * int(config["BLOCK_M"])),
        },
        scalars={"pairs": shape.pairs},  # not a constant: each number of tokens would be compiled while serving
        constants={
            "PADDED_PAIRS": padded,
            "BLOCK_M": config["BLOCK_M"],
            "CHUNK": _ALIGN_CHUNK,
            "HAS_MAP": shape.has_map,
        },
        grid=(1, 1, 1),
        num_warps=8 if padded <= 64 else 16,
    )


def gate_up_launch(shape: MoeShape, config: Config, limit: float | None, element: str, amd: bool) -> Launch:
    """Launch of gate and up with SwiGLU: ``hidden [pairs, intermediate]``."""
    return _expert_launch(
        "gate_up",
        shape,
        config,
        n=shape.intermediate,
        k=shape.hidden,
        weight_rows=2 * shape.intermediate,
        inputs={"x_ptr": (shape.tokens * shape.hidden, element)},
        outputs={"hidden_ptr": Pointer(element, shape.pairs * shape.intermediate * ELEMENT_BYTES[element])},
        constants={"TOP_K": shape.top_k, "LIMIT": limit},
        element=element,
        amd=amd,
    )


def down_launch(shape: MoeShape, config: Config, element: str, amd: bool) -> Launch:
    """Launch of down with the routing weight: ``partial [pairs, hidden]``."""
    kind = partial_element(config, element)
    return _expert_launch(
        "down",
        shape,
        config,
        n=shape.hidden,
        k=shape.intermediate,
        weight_rows=shape.hidden,
        inputs={"hidden_ptr": (shape.pairs * shape.intermediate, element)},
        outputs={
            "topk_weights_ptr": Pointer("fp32", 4 * shape.pairs),
            "partial_ptr": Pointer(kind, shape.pairs * shape.hidden * ELEMENT_BYTES[kind]),
        },
        constants={},
        element=element,
        amd=amd,
    )


def partial_element(config: Config, element: str) -> str:
    """Type of the experts' separate outputs: float32 for a few tokens, the activations' for many, to halve them."""
    return "fp32" if config["phase"] == "decode" else element


def combine_launch(shape: MoeShape, config: Config, element: str) -> Launch:
    """Launch of the sum over each token's experts: ``y [tokens, hidden]``."""
    kind = partial_element(config, element)
    return Launch(
        name="nl4_moe_combine",
        function=nl4_moe_combine_kernel,
        pointers={
            "partial_ptr": Pointer(kind, shape.pairs * shape.hidden * ELEMENT_BYTES[kind]),
            "topk_ids_ptr": Pointer("i32", 4 * shape.pairs),
            "expert_map_ptr": Pointer("i32", 4 * shape.experts),
            "y_ptr": Pointer(element, shape.tokens * shape.hidden * ELEMENT_BYTES[element]),
        },
        scalars={"n": shape.hidden},
        constants={
            "TOP_K": shape.top_k,
            "PADDED_TOP_K": 1 << (shape.top_k - 1).bit_length(),
            "BLOCK_N": _COMBINE_COLUMNS,
            "HAS_MAP": shape.has_map,
        },
        grid=(-(-shape.hidden // _COMBINE_COLUMNS), shape.tokens, 1),
        num_warps=_COMBINE_WARPS,
    )


def _expert_launch(
    part: str,
    shape: MoeShape,
    config: Config,
    *,
    n: int,
    k: int,
    weight_rows: int,
    inputs: Mapping[str, tuple[int, str]],
    outputs: Mapping[str, Pointer],
    constants: Mapping[str, object],
    element: str,
    amd: bool,
) -> Launch:
    """Launch of one of the four expert kernels; ``config`` names the sizes of each part with a prefix."""
    check_element(element, amd)
    decode = config["phase"] == "decode"
    prefix = f"{part}_"
    blocks = block_count(shape, config)
    block_m = int(config["BLOCK_M"])
    sizes: dict[str, object] = {"BLOCK_M": block_m}
    if decode:
        repeat, split_k, lanes = (int(config[prefix + key]) for key in ("REPEAT", "SPLIT_K", "LANES"))
        block_n, block_k = repeat * lanes, 32 * split_k
        sizes |= {"REPEAT": repeat, "SPLIT_K": split_k, "LANES": lanes, "ONE_PAIR": one_pair_blocks(shape, config)}
    else:
        block_n, block_k = int(config[prefix + "BLOCK_N"]), int(config[prefix + "BLOCK_K"])
        sizes |= {"BLOCK_N": block_n, "BLOCK_K": block_k}
    kernels = {
        ("gate_up", True): nl4_moe_gate_up_decode_kernel,
        ("gate_up", False): nl4_moe_gate_up_prefill_kernel,
        ("down", True): nl4_moe_down_decode_kernel,
        ("down", False): nl4_moe_down_prefill_kernel,
    }
    input_pointers = {
        name: Pointer("i64" if decode else kind, count * ELEMENT_BYTES[kind]) for name, (count, kind) in inputs.items()
    }
    return Launch(
        name=f"nl4_moe_{part}_{config['phase']}",
        function=kernels[part, decode],
        pointers={
            **input_pointers,
            **weight_pointers(weight_rows, k, shape.experts),
            "block_experts_ptr": Pointer("i32", 4 * blocks),
            "block_pairs_ptr": Pointer("i32", 4 * blocks * block_m),
            **outputs,
        },
        scalars={"n": n, "k": k},
        constants={
            **constants,
            **sizes,
            "EVEN_N": even(n, block_n),
            "EVEN_K": even(k, block_k),
            "ELEMENT": element,
            "AMD": amd,
        },
        grid=(-(-n // block_n), blocks, 1),
        **num_options(config, prefix),  # type: ignore[arg-type]
    )
