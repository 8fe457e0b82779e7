"""The kernels' order of NL4 weights holds the checkpoint's weights, each where the docstring says."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from step128_kernels import codebook, nl4_layout, torch_codebook
from step128_kernels.nl4_gemm import nl4_gemm, nl4_gemm_tiled
from step128_kernels.nl4_layout import from_kernel_layout, rows_of, tile_shape, to_kernel_layout
from step128_kernels.nl4_moe import nl4_moe, nl4_moe_tiled
from step128_kernels.nl4_moe.reference import route

# Rows and columns: whole tiles, rows short of a tile, columns short of one, a single group, many row blocks.
SHAPES = [(16, 32), (32, 96), (7, 64), (40, 80), (1, 16), (17, 16), (33, 144), (250, 48)]


def stored(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random indices and scales of weights of ``shape``; every byte and every bit of a scale occurs."""
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8)
    scale = random.integers(0, 1 << 15, (*shape[:-1], shape[-1] // 16), dtype=np.uint16).view(np.float16)
    return torch.from_numpy(packed), torch.from_numpy(scale)


def same_bits(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.dtype == wanted.dtype and np.array_equal(
        got.contiguous().numpy().view(np.uint8), wanted.contiguous().numpy().view(np.uint8)
    )


@pytest.fixture(params=[None, 64], ids=["one block", "blocks of a tile"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(nl4_layout, "_BYTES_PER_BLOCK", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(lead: tuple[int, ...], shape: tuple[int, int]) -> None:
    packed, scale = stored(*lead, *shape)
    tiles, scales = to_kernel_layout(packed, scale)
    assert tiles.dtype == torch.int64 and tiles.shape == (*lead, *tile_shape(*shape), 16, 2) and tiles.is_contiguous()
    assert scales.dtype == torch.int32 and scales.shape == tiles.shape[:-1] and scales.is_contiguous()
    again = from_kernel_layout(tiles, scales, *shape)
    assert same_bits(again[0], packed) and same_bits(again[1], scale)


def test_weights_that_are_views() -> None:
    packed, scale = stored(4, 20, 64)
    wanted = to_kernel_layout(packed[1::2, 3:].contiguous(), scale[1::2, 3:].contiguous())
    got = to_kernel_layout(packed[1::2, 3:], scale[1::2, 3:])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.usefixtures("block_bytes")
def test_the_128_bits_of_a_lane() -> None:
    """Byte j of each 32 bits has weight j in its low nibble, weight j + 4 in its high one; two groups a lane."""
    rows, columns = 37, 80
    packed, scale = stored(rows, columns)
    tiles, scales = to_kernel_layout(packed, scale)
    index = codebook.unpack_indices(packed.numpy())
    for row in range(rows):
        for column_tile in range(tile_shape(rows, columns)[1]):
            lane = tiles[row // 16, column_tile, row % 16].numpy().view(np.uint8)
            two_scales = scales[row // 16, column_tile, row % 16 : row % 16 + 1].numpy().view(np.uint16)
            for weight in range(32):
                byte = lane[weight // 8 * 4 + weight % 4]
                found = byte >> 4 if weight % 8 >= 4 else byte & 15
                column = 32 * column_tile + weight
                assert found == (index[row, column] if column < columns else 8)
            groups = scale[row, 2 * column_tile : 2 * column_tile + 2].numpy().view(np.uint16)
            assert two_scales.tolist() == [*groups, 0][:2]


@pytest.mark.parametrize("shape", [(7, 64), (40, 80), (1, 16)])
def test_padding_is_exactly_zero(shape: tuple[int, int]) -> None:
    row_tiles, column_tiles = tile_shape(*shape)
    tiles, scales = to_kernel_layout(*stored(*shape))
    whole = torch_codebook.dequantize(*from_kernel_layout(tiles, scales, 16 * row_tiles, 32 * column_tiles))
    assert torch.count_nonzero(whole[shape[0] :]) == 0 and torch.count_nonzero(whole[:, shape[1] :]) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_some_rows(shape: tuple[int, int]) -> None:
    packed, scale = stored(*shape)
    tiles, scales = to_kernel_layout(packed, scale)
    random = torch.Generator().manual_seed(0)
    for size in ((), (1,), (5,), (2, 3), (0,)):
        rows = torch.randint(0, shape[0], size, generator=random)
        got = rows_of(tiles, scales, rows, shape[1])
        assert same_bits(got[0], packed[rows]) and same_bits(got[1], scale[rows])


@pytest.mark.parametrize(
    ("packed", "scale"), [((4, 16), (4, 1)), ((4, 16), (3, 2)), ((2, 4, 16), (4, 2)), ((4, 4), (4, 0))]
)
def test_shapes_that_do_not_belong_together(packed: tuple[int, ...], scale: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        to_kernel_layout(torch.zeros(packed, dtype=torch.uint8), torch.zeros(scale, dtype=torch.float16))


def test_little_memory_beside_the_result() -> None:
    """64 MiB of weights are reordered with less than 40 MiB beside the result (which lies on the other side)."""
    resource = pytest.importorskip("resource")
    program = (
        "import resource, torch\n"
        "from step128_kernels.nl4_layout import to_kernel_layout\n"
        "def peak():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "packed = torch.ones(4, 8192, 2048, dtype=torch.uint8)\n"
        "scale = torch.ones(4, 8192, 256, dtype=torch.float16)\n"
        "to_kernel_layout(packed[:1, :64], scale[:1, :64])\n"
        "before = peak()\n"
        "to_kernel_layout(packed, scale)\n"
        "print(peak() - before)\n"
    )
    assert resource is not None
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64 + 16 + 40  # MiB: indices, scales, and what comes beside them


def real_weight(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1
    packed, scale = codebook.quantize(weight)
    return torch.from_numpy(packed), torch.from_numpy(scale)


def test_reference_on_a_cpu_from_either_order() -> None:
    weight = real_weight(37, 48)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nl4_gemm_tiled(x, *to_kernel_layout(*weight), 37), nl4_gemm(x, *weight))


@pytest.mark.parametrize("expert_map", [None, torch.tensor([-1, 0, 1, 2, -1])])
def test_experts_on_a_cpu_from_either_order(expert_map: torch.Tensor | None) -> None:
    experts = 5 if expert_map is None else 3
    gate_up, down = real_weight(experts, 32, 48, seed=1), real_weight(experts, 48, 16, seed=2)
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    routing = route(torch.randn(9, 5, generator=torch.Generator().manual_seed(1)), None, 2, True, 3.0)
    wanted = nl4_moe(x, *gate_up, *down, *routing, 0.05, expert_map)
    tiled = (*to_kernel_layout(*gate_up), *to_kernel_layout(*down))
    assert torch.equal(nl4_moe_tiled(x, *tiled, *routing, 16, 0.05, expert_map), wanted)
