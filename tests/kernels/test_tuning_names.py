"""Names of tuned files: vLLM's grammar, and the spellings of a GPU."""

import pytest

from step128_kernels.tuned.names import file_name, parse_file_name, spellings

R9700 = ("AMD_Radeon_R9700", "AMD_Radeon_AI_PRO_R9700")
STRIX = ("AMD_Radeon_8060S", "Radeon_8060S_Graphics")
GEMM = {"N": 2560, "K": 4096}
MOE = {"E": 240, "N": 320, "K": 4096, "top_k": 8}


def test_names_are_those_of_vllm() -> None:
    """As vLLM 0.32 writes them (fused_moe.get_config_file_name; fp8_utils for linear layers)."""
    assert file_name("nl4_moe", MOE, "AMD_Radeon_R9700") == "E=240,N=320,device_name=AMD_Radeon_R9700,dtype=nl4.json"
    assert (
        file_name("nl4_gemm", GEMM, "AMD_Radeon_R9700") == "N=2560,K=4096,device_name=AMD_Radeon_R9700,dtype=nl4.json"
    )
    assert file_name("vllm_fused_moe", MOE, "AMD Radeon 8060S") == "E=240,N=320,device_name=AMD_Radeon_8060S.json"


@pytest.mark.parametrize("kernel", ["nl4_gemm", "nl4_moe", "vllm_fused_moe"])
def test_a_name_belongs_to_one_kernel_only(kernel: str) -> None:
    shape = GEMM | MOE
    name = file_name(kernel, shape, STRIX[0])
    parsed = parse_file_name(kernel, name)
    assert parsed is not None
    assert parsed[1] == STRIX[0]
    assert all(shape[dimension] == size for dimension, size in parsed[0].items())
    others = {"nl4_gemm", "nl4_moe", "vllm_fused_moe"} - {kernel}
    assert [parse_file_name(other, name) for other in others] == [None, None]


def test_names_need_a_known_kernel_and_all_dimensions() -> None:
    with pytest.raises(ValueError, match=r"'nl5'.*nl4_gemm, nl4_moe"):
        file_name("nl5", GEMM, R9700[0])
    with pytest.raises(ValueError, match="nl4_moe needs E"):
        file_name("nl4_moe", GEMM, R9700[0])


def test_spellings_begin_with_vllms() -> None:
    assert spellings("AMD Radeon AI PRO R9700") == R9700
    assert spellings("Radeon 8060S Graphics") == STRIX
    assert spellings("AMD Radeon RX 9070/XT") == ("AMD_Radeon_RX_9070_XT",)
