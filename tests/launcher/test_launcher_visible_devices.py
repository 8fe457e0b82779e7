"""Which GPUs a process would see: the variables that hide some, the compute driver's order, a container's rules."""

import shutil
from pathlib import Path

import pytest

from step128_launcher.hardware import probe

MACHINES = Path(__file__).parents[1] / "machines"
A, B, C, D = (f"0000:{bus}:00.0" for bus in ("03", "23", "43", "63"))
SECOND = "GPU-00005A5A00000081"


@pytest.mark.parametrize(
    ("environment", "visible"),
    [
        ({}, [A, B, C, D]),
        ({"HIP_VISIBLE_DEVICES": "0,2"}, [A, C]),
        ({"HIP_VISIBLE_DEVICES": ""}, [A, B, C, D]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"HIP_VISIBLE_DEVICES": "-2"}, []),
        ({"HIP_VISIBLE_DEVICES": "1,7,2"}, [B]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"ROCR_VISIBLE_DEVICES": f"0,{SECOND}"}, [A, B]),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, [D]),
        ({"CUDA_VISIBLE_DEVICES": "3"}, [D]),
        ({"CUDA_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "0"}, [A]),
        ({"GPU_DEVICE_ORDINAL": "1"}, [B]),
    ],
)
def test_visible_devices(environment: dict[str, str], visible: list[str]) -> None:
    found = probe(MACHINES / "quad-r9700", environment | {"HOME": "/"})
    assert [gpu.pci_address for gpu in found.usable_gpus] == visible
    assert found.visible_devices == environment and len(found.gpus) == 4


@pytest.mark.parametrize("value", ["0000:03:00.0", "all", "GPU-"])
def test_a_form_not_understood_hides_nothing_and_is_said(value: str) -> None:
    found = probe(MACHINES / "r9700-plus-igpu", {"HIP_VISIBLE_DEVICES": value})
    assert len(found.usable_gpus) == 2
    assert any("HIP_VISIBLE_DEVICES" in line and value in line for line in found.unreadable)


def test_indices_need_the_compute_drivers_order(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "quad-r9700", tree, symlinks=True)
    shutil.rmtree(tree / "sys/class/kfd")
    found = probe(tree, {"HIP_VISIBLE_DEVICES": "0"})
    assert len(found.usable_gpus) == 4 and any("order" in line for line in found.unreadable)
    # Without the driver's topology the cards are still known as cards, and the Strix Halo below as integrated.
    assert not any(gpu.integrated for gpu in found.gpus)
    tree = tmp_path / "strix"
    shutil.copytree(MACHINES / "strix-halo-128-default", tree, symlinks=True)
    shutil.rmtree(tree / "sys/class/kfd")
    assert probe(tree, {}).gpus[0].integrated


def test_indices_count_in_the_compute_drivers_order(tmp_path: Path) -> None:
    """HIP's first GPU is KFD's first node, whatever its PCI address."""
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "r9700-plus-igpu", tree, symlinks=True)
    nodes = tree / "sys/class/kfd/kfd/topology/nodes"
    (nodes / "1").rename(nodes / "3")
    (gpu,) = probe(tree, {"HIP_VISIBLE_DEVICES": "0"}).usable_gpus
    assert gpu.integrated


def test_gpus_that_the_container_denies_are_not_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container given one render node: the compute driver answers EPERM for the other cards' nodes."""
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "quad-r9700", tree, symlinks=True)
    real = Path.read_text

    def read_text(path: Path, **options: str) -> str:
        if path.match("nodes/[234]/properties"):
            raise PermissionError(1, "Operation not permitted")
        return real(path, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    found = probe(tree, {})
    assert [gpu.pci_address for gpu in found.usable_gpus] == [A] and len(found.gpus) == 4
    assert sum("Operation not permitted" in line for line in found.unreadable) == 3
