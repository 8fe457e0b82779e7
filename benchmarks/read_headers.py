"""Time to read and check a real-size checkpoint of 40,000 tensors in 100 shards, headers only.

The shards are fabricated: true names, shapes and offsets for Step-3.7-Flash's dimensions, one tensor for each of 308
experts, and no data (sparse files), so the figure is of parsing and checking, with the headers in the page cache.
Prints one JSON line: the best of five, and each, in seconds.
"""

import json
import math
import os
import struct
import sys
import tempfile
import time
from pathlib import Path

from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.model.checkpoint import read_footprint
from step128_launcher.model.model_config import read_model_config
from step128_launcher.model.quantization import read_format
from step128_launcher.model.tensors import expected_tensors

CONFIG = Path(__file__).parents[1] / "tests" / "data" / "step-3.7-flash-240" / "config.json"
EXPERTS, SHARDS, RUNS = 308, 100, 5


def fabricate(folder: Path) -> None:
    """Write config.json, the index and the shards into `folder`."""
    document = json.loads(CONFIG.read_text(encoding="utf-8"))
    document["text_config"]["moe_num_experts"] = EXPERTS
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    form = read_format(find_configs_dir(os.environ))
    tensors = list(expected_tensors(read_model_config(folder), form, None, per_expert=True).values())
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        shard = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors[number::SHARDS]:
            end = position + 2 * math.prod(tensor.shape)
            header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [position, end]}
            weight_map[tensor.name] = shard
            position = end
        raw = json.dumps(header).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(folder / shard, 8 + len(raw) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    """Fabricate, read five times, print."""
    form = read_format(find_configs_dir(os.environ))
    with tempfile.TemporaryDirectory() as name:
        fabricate(Path(name))
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            footprint = read_footprint(Path(name), form)
            seconds.append(round(time.perf_counter() - start, 3))
    figures = {
        "benchmark": "read_headers",
        "tensors": footprint.tensors,
        "shards": footprint.shards,
        "stored_bytes": footprint.stored_bytes,
        "seconds": min(seconds),
        "runs": seconds,
        "python": sys.version.split()[0],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
