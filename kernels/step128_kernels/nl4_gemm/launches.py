"""How an NL4 linear layer is launched: the one place that turns a shape and a config into kernel arguments.

The host wrapper runs what stands here, and the offline inspection compiles and counts it.
"""

from __future__ import annotations

from collections.abc import Mapping

from step128_kernels.launch import Launch, Pointer
from step128_kernels.nl4_arguments import ELEMENT_BYTES, check_element, even, num_options, weight_pointers
from step128_kernels.nl4_gemm.decode import nl4_gemm_decode_kernel
from step128_kernels.nl4_gemm.prefill import nl4_gemm_prefill_kernel


def gemm_launch(m: int, n: int, k: int, config: Mapping[str, int | str], element: str, amd: bool) -> Launch:
    """Launch of ``y [m, n] = x [m, k] @ W.T``.

    Args:
        m: activation rows, at least 1.
        n: rows of the weight.
        k: columns of the weight, a multiple of 16.
        config: ``phase`` and the block sizes of that phase, as in ``configs/tuned``.
        element: "bf16", "fp16" or "fp32", the activations' type.
        amd: with AMD's assembly, or portable.
    """
    check_element(element, amd)
    decode = config["phase"] == "decode"
    pointers = {
        "x_ptr": Pointer("i64" if decode else element, m * k * ELEMENT_BYTES[element]),
        **weight_pointers(n, k),
        "y_ptr": Pointer(element, m * n * ELEMENT_BYTES[element]),
    }
    block_m = int(config["BLOCK_M"])
    constants: dict[str, object] = {"BLOCK_M": block_m}
    if decode:
        repeat, split_k, lanes = (int(config[key]) for key in ("REPEAT", "SPLIT_K", "LANES"))
        block_n, block_k = repeat * lanes, 32 * split_k
        constants |= {"REPEAT": repeat, "SPLIT_K": split_k, "LANES": lanes}
    else:
        block_n, block_k = int(config["BLOCK_N"]), int(config["BLOCK_K"])
        constants |= {"BLOCK_N": block_n, "BLOCK_K": block_k}
    constants |= {"EVEN_N": even(n, block_n), "EVEN_K": even(k, block_k), "ELEMENT": element, "AMD": amd}
    return Launch(
        name=f"nl4_gemm_{config['phase']}",
        function=nl4_gemm_decode_kernel if decode else nl4_gemm_prefill_kernel,
        pointers=pointers,
        scalars={"m": m, "n": n, "k": k},
        constants=constants,
        grid=(-(-m // block_m), -(-n // block_n), 1),
        **num_options(config),  # type: ignore[arg-type]
    )
