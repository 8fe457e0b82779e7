"""What the probe finds in each machine's tree, and in trees that are unlike them."""

import filecmp
import runpy
import shutil
from pathlib import Path

import pytest

from step128_launcher.hardware import probe
from step128_launcher.machine.kfd import address_of, gfx_target
from step128_launcher.machine.types import Gpu, PcieLink, TtmLimit

MACHINES = Path(__file__).parents[1] / "machines"
MIB, GIB = 2**20, 2**30
R9700_BYTES = 32624 * MIB


def test_trees_are_what_their_script_writes(tmp_path: Path) -> None:
    runpy.run_path(str(MACHINES / "make_trees.py"))["make_all"](tmp_path)
    for made in sorted(tmp_path.iterdir()):
        files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
        here = MACHINES / made.name
        assert sorted(files) == sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
        equal, different, errors = filecmp.cmpfiles(made, here, map(str, files), shallow=False)
        assert not different and not errors and len(equal) == len(files)
        assert (here / "ORIGIN").read_text().startswith("Made from the documented paths and units, not recorded.")


def test_quad_r9700() -> None:
    found = probe(MACHINES / "quad-r9700", {})
    assert found.unreadable == ()
    assert [gpu.pci_address for gpu in found.gpus] == [f"0000:{bus:02x}:00.0" for bus in (0x03, 0x23, 0x43, 0x63)]
    for number, gpu in enumerate(found.gpus):
        assert gpu == Gpu(
            vendor="amd",
            pci_address=gpu.pci_address,
            pci_id="1002:7551",
            name="AMD Radeon AI PRO R9700",
            target="gfx1201",
            compute_units=64,
            integrated=False,
            vram_total_bytes=R9700_BYTES,
            vram_used_bytes=64 * MIB,
            visible_vram_bytes=R9700_BYTES,
            gtt_total_bytes=found.memory_total_bytes // 2,
            gtt_used_bytes=24 * MIB,
            link=PcieLink(16.0, 16, 16.0, 16),
            numa_node=0,
            power_cap_watts=300.0,
            render_node=f"/dev/dri/renderD{128 + number}",
            visible=True,
            kfd_node=number + 1,
            unique_id=f"{0x5A5A00000080 + number:016x}",
            iommu_domain="identity",
        )
    assert found.has_amd_gpu and not found.has_nvidia_gpu and found.container is None
    assert found.ttm_limits == (TtmLimit("ttm", found.memory_total_bytes // 2),)
    assert found.kernel_release == "6.18.7" and "iommu=pt" in (found.kernel_command_line or "")
    assert found.groups == (44, 992, 1000) and len(found.cpu_ids) == 32
    assert found.shm_bytes == found.memory_total_bytes // 2 and found.swap_total_bytes == 8388604 * 1024
    assert [node.path for node in found.device_nodes][:2] == ["/dev/kfd", "/dev/dri/renderD128"]
    assert found.firmware["rocm"] == "7.2.1" and found.firmware["librccl"] == "1.0.70201"
    assert found.firmware["0000:63:00.0 mes"] == "0x00000083"
    assert found.firmware["0000:03:00.0 vbios"] == "113-MADE-7551"


def test_quad_48gb() -> None:
    found = probe(MACHINES / "quad-48gb", {})
    assert [(gpu.target, gpu.compute_units, gpu.integrated) for gpu in found.gpus] == [("gfx1100", 96, False)] * 4
    assert {gpu.vram_total_bytes for gpu in found.gpus} == {48 * GIB - 16 * MIB}


def test_the_slot_not_the_chip_is_the_link() -> None:
    """The card's inner link is 32 GT/s x16 in every tree; this desktop's slot gives 8 lanes at 16 GT/s."""
    (gpu,) = probe(MACHINES / "single-r9700", {}).gpus
    assert gpu.link == PcieLink(16.0, 8, 16.0, 8) and gpu.numa_node is None and gpu.iommu_domain == "DMA-FQ"


def test_card_beside_an_integrated_gpu() -> None:
    card, small = probe(MACHINES / "r9700-plus-igpu", {}).gpus
    assert (card.target, card.integrated, small.target, small.integrated) == ("gfx1201", False, "gfx1036", True)
    assert small.link is None and small.power_cap_watts is None and small.compute_units == 2


@pytest.mark.parametrize(
    ("name", "vram", "gtt"),
    [("default", GIB // 2, 125 * GIB // 2), ("gtt120", GIB // 2, 120 * GIB), ("carveout96", 96 * GIB, 15 * GIB)],
)
def test_strix_halo(name: str, vram: int, gtt: int) -> None:
    found = probe(MACHINES / f"strix-halo-128-{name}", {})
    (gpu,) = found.gpus
    assert gpu.integrated and (gpu.target, gpu.compute_units) == ("gfx1151", 40)
    assert (gpu.vram_total_bytes, gpu.gtt_total_bytes) == (vram, gtt)
    assert found.ttm_limits == (TtmLimit("ttm", gtt),)
    assert found.memory_total_bytes == (30 if name == "carveout96" else 125) * GIB


def test_lxc_container_sees_the_hosts_memory_and_its_own_limit() -> None:
    found = probe(MACHINES / "strix-halo-lxc", {})
    assert found.container == "lxc" and found.memory_total_bytes == 125 * GIB
    assert (found.cgroup_limit_bytes, found.memory_available_bytes) == (64 * GIB, 62 * GIB)


@pytest.mark.parametrize(
    ("name", "address", "target", "driver"),
    [("dgx-spark", "000f:01:00.0", "sm_121", "580.95.05"), ("jetson-thor", "0000:01:00.0", "sm_110", "580.00")],
)
def test_nvidia_boxes_with_unified_memory(name: str, address: str, target: str, driver: str) -> None:
    found = probe(MACHINES / name, {})
    (gpu,) = found.gpus
    assert (gpu.vendor, gpu.pci_address, gpu.target, gpu.integrated) == ("nvidia", address, target, True)
    assert gpu.vram_total_bytes is None and gpu.link is None and found.firmware["nvidia"] == driver
    assert found.has_nvidia_gpu and found.unreadable == ()


def test_no_gpu() -> None:
    found = probe(MACHINES / "no-gpu", {})
    assert found.gpus == () and found.device_nodes == () and found.unreadable == ()


@pytest.mark.parametrize(
    ("version", "target"),
    [(120001, "gfx1201"), (110501, "gfx1151"), (100306, "gfx1036"), (90010, "gfx90a"), (0, None), (2**32 - 1, None)],
)
def test_gfx_targets(version: int, target: str | None) -> None:
    assert gfx_target(version) == target


def test_location_ids() -> None:
    assert address_of("0001:c5:02.3") == (1, 0xC5 << 8 | 2 << 3 | 3)


def test_a_use_above_the_total_is_no_figure(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "single-r9700", tree, symlinks=True)
    used = tree / "sys/class/drm/card1/device/mem_info_vram_used"
    used.write_text(f"{R9700_BYTES + 1}\n")
    found = probe(tree, {})
    assert found.gpus[0].vram_used_bytes is None and found.gpus[0].vram_total_bytes == R9700_BYTES
    assert len(found.unreadable) == 1 and "more than the total" in found.unreadable[0]


def test_unknown_gpu_is_integrated_if_the_driver_gives_it_no_memory_controller(tmp_path: Path) -> None:
    """A future device: no known id, no known target."""
    for name, integrated in (("strix-halo-128-default", True), ("single-r9700", False)):
        tree = tmp_path / name
        shutil.copytree(MACHINES / name, tree, symlinks=True)
        (tree / "sys/class/drm/card1/device/device").write_text("0x9999\n")
        properties = tree / "sys/class/kfd/kfd/topology/nodes/1/properties"
        text = properties.read_text().replace("110501", "130001").replace("120001", "130001")
        properties.write_text(text)
        (gpu,) = probe(tree, {}).gpus
        assert (gpu.target, gpu.integrated, gpu.name) == ("gfx1301", integrated, "AMD GPU 0x9999")
        properties.write_text(text.replace("cpu_cores_count 0", "cpu_cores_count 8"))
        assert probe(tree, {}).gpus[0].integrated


@pytest.mark.parametrize(
    ("marker", "kind"),
    [
        (".dockerenv", "docker"),
        ("run/.containerenv", "podman"),
        ("var/run/secrets/kubernetes.io/token", "kubernetes"),
        ("dev/lxc/console", "lxc"),
        ("etc/hostname", None),
    ],
)
def test_kinds_of_containers(tmp_path: Path, marker: str, kind: str | None) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "no-gpu", tree)
    (tree / marker).parent.mkdir(parents=True, exist_ok=True)
    (tree / marker).touch()
    assert probe(tree, {}).container == kind


def test_cards_of_other_drivers_are_passed_over(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "single-r9700", tree, symlinks=True)
    device = tree / "sys/class/drm/card1/device"
    (device / "uevent").write_text("DRIVER=vfio-pci\nPCI_SLOT_NAME=0000:03:00.0\n")
    assert probe(tree, {}).gpus == ()
