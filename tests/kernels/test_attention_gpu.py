"""The attention kernels on this machine's GPU, if it has one: results, and a captured graph over other lengths."""

import pytest
import torch

from step128_kernels.attention import paged_attention, scratch_elements
from step128_kernels.attention.configs import choose
from step128_kernels.attention.runner import attention_runner, made_up_inputs
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.tune.measure import wrong_result

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kv_dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("query_tokens, context", [(1, 1024), (4, 65536), (8, 5000), (512, 4096)])
@pytest.mark.parametrize("ratio, window", [(8, 0), (12, 512)])
def test_a_call_is_right(kv_dtype: str, query_tokens: int, context: int, ratio: int, window: int) -> None:
    shape = AttentionShape(2 * ratio, 2, 128, window, 16, kv_dtype, "bf16")
    config = choose(shape, 2, query_tokens, context, torch.device("cuda", 0))
    kernel, reference = attention_runner(AttentionCall(shape, 2, query_tokens, context), config)
    assert wrong_result(kernel(), reference()) is None


def test_a_captured_graph_serves_other_lengths() -> None:
    call = AttentionCall(AttentionShape(16, 2, 128, 0, 16, "fp8", "bf16"), 2, 4, 8192)
    inputs = made_up_inputs(call, torch.device("cuda", 0))
    out, right = torch.empty_like(inputs.query), torch.empty_like(inputs.query)
    scratch = torch.empty(scratch_elements(16, 128), device="cuda")

    def run(into: torch.Tensor) -> None:
        paged_attention(
            inputs.query, inputs.cache, inputs.table, inputs.lengths, inputs.starts, scale=0.1, window=0,
            k_scale=inputs.k_scale, v_scale=inputs.v_scale, max_query_tokens=4, max_context_tokens=8192, out=into,
            scratch=scratch,
        )  # fmt: skip

    run(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out)
    for lengths in ((8192, 37), (4, 5000)):
        inputs.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        run(right)
        assert torch.equal(out, right)
