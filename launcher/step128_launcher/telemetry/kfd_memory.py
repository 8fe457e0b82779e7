"""Memory as the compute driver knows it: heaps of each node, and the VRAM that its processes hold.

Sources: the kernel's drivers/gpu/drm/amd/amdkfd: kfd_topology.c (mem_banks/N/properties), kfd_crat.h (heap types) and
kfd_process.c (proc/PID/vram_GPUID in bytes). `local_mem_size` of a node is always 0 and not read.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from step128_launcher.machine.reader import MAX_MEMORY_BYTES, whole_number
from step128_launcher.telemetry.cards import Node
from step128_launcher.telemetry.families import Sample
from step128_launcher.telemetry.readings import Readings

_HEAPS = {0: "system", 1: "vram_public", 2: "vram_private", 3: "gds", 4: "lds", 5: "scratch"}


def read_heaps(readings: Readings, nodes: tuple[Node, ...]) -> Iterator[Sample]:
    """Yield the size of each node's heaps."""
    for node in nodes:
        heaps: Counter[str] = Counter()
        for path in node.banks:
            text = readings.text(path)
            if text is None:
                continue
            pairs = (line.partition(" ") for line in text.splitlines())
            values = {name: whole_number(value.strip()) for name, _, value in pairs}
            heap, size = values.get("heap_type"), values.get("size_in_bytes")
            if heap not in _HEAPS or size is None or not 0 <= size <= MAX_MEMORY_BYTES:
                readings.note(Path(path), "no heap with a size")
                continue
            heaps[_HEAPS[heap]] += size
        for name, size in heaps.items():
            yield Sample("step128_kfd_memory_bytes", (str(node.index), node.gpu, name), float(size))


def read_processes(readings: Readings, nodes: tuple[Node, ...]) -> Iterator[Sample]:
    """Yield how many processes use the compute driver, and the VRAM they hold on each GPU; processes come and go."""
    gpus = [node for node in nodes if node.gpu_id is not None and node.gpu]
    folder = readings.root / "sys/class/kfd/kfd/proc"
    if not gpus or not folder.is_dir():
        return
    processes = [name for name in readings.names(folder) if name.isdigit()]
    yield Sample("step128_kfd_processes", (), float(len(processes)))
    for node in gpus:
        held = 0
        for process in processes:
            path = f"{folder}/{process}/vram_{node.gpu_id}"
            text = readings.passing_text(path)
            if text is not None:
                held += readings.bounded(Path(path), text, 0, MAX_MEMORY_BYTES) or 0
        yield Sample("step128_kfd_process_vram_bytes", (node.gpu,), float(held))
