"""Speed of NL4 quantization: weights per second and core of each method on one expert's matrix, and what it means for
the whole model.

A Gaussian matrix of 1280 x 4096 (gate or up projection of an expert) and inputs in a quarter as many directions as
channels, on one core: absmax, mse, the search weighted by importance, GPTQ, and the numpy reference of the weighted
search. The errors that they leave rank the methods; how far apart they are depends on a real layer's inputs. Each
method is run once uncounted, to compile it. The projection to all cores assumes that threads scale, which `--threads`
measures. `--ggml-library` also times llama.cpp's IQ4_NL (the same codebook, groups of 32, 4.5 bits) with the same
importances, from a shared library of ggml that you built. The last line is one JSON document.

    python benchmarks/quantize_speed.py [--repetitions 3] [--threads] [--ggml-library libggml-base.so]
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from step128_checkpoint.quantization import gptq, quality, search
from step128_kernels import codebook

ROWS, COLUMNS = 1280, 4096
MODEL_WEIGHTS = 1.7e11
REFERENCE_ROWS = 128  # the numpy reference is slow; its speed does not depend on the number of rows
IQ4_NL = 20  # ggml_type
IQ4_NL_BITS = 4.5


def make_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight [ROWS, COLUMNS], second moments [COLUMNS] with a few large channels, correlated Hessian with these."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((ROWS, COLUMNS), dtype=np.float32) * np.float32(0.02)
    mixing = random.standard_normal((COLUMNS // 4, COLUMNS), dtype=np.float32)
    mixing *= np.exp(random.standard_normal(COLUMNS, dtype=np.float32))
    hessian = mixing.T @ mixing / np.float32(COLUMNS // 4)
    return weight, np.ascontiguousarray(np.diagonal(hessian)), hessian


def measure(task: Callable[[], Any], weights: int, repetitions: int) -> dict[str, Any]:
    """Run `task` once, then `repetitions` times; weights per second of the best and the median."""
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - start)
    counted = seconds[1:]
    best, median = weights / min(counted), weights / statistics.median(counted)
    hours = MODEL_WEIGHTS / median / 3600
    return {
        "best_weights_per_second": round(best),
        "median_weights_per_second": round(median),
        "model_hours_one_core": round(hours, 2),
        "model_hours_all_cores": round(hours / (os.cpu_count() or 1), 2),
        "seconds": [round(value, 4) for value in counted],
    }


def decibels(weight: np.ndarray, restored: np.ndarray, hessian: np.ndarray) -> dict[str, float]:
    """Signal over quantization noise of the weights, and of the layer's output for inputs with these second moments."""
    difference = restored - weight
    powers = [float(((part @ hessian) * part).sum(dtype=np.float64)) for part in (weight, difference)]
    plain = [float((part.astype(np.float64) ** 2).sum()) for part in (weight, difference)]
    return {
        name: round(10 * math.log10(signal / noise), 2)
        for name, (signal, noise) in (("sqnr_db", plain), ("output_sqnr_db", powers))
    }


class Ggml:
    """llama.cpp's quantizer, of a shared library that exports ggml_quantize_chunk and dequantize_row_iq4_nl."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.ggml_row_size.restype = ctypes.c_size_t
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantize(self, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """IQ4_NL blocks of a float32 [rows, K]: uint8 [rows, bytes]."""
        rows, columns = weight.shape
        row_bytes = self._library.ggml_row_size(ctypes.c_int(IQ4_NL), ctypes.c_int64(columns))
        blocks = np.empty((rows, row_bytes), dtype=np.uint8)
        self._library.ggml_quantize_chunk(
            ctypes.c_int(IQ4_NL),
            ctypes.c_void_p(weight.ctypes.data),
            ctypes.c_void_p(blocks.ctypes.data),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            ctypes.c_void_p(None if importance is None else importance.ctypes.data),
        )
        return blocks

    def dequantize(self, blocks: np.ndarray, columns: int) -> np.ndarray:
        """Float32 [rows, K] of what :meth:`quantize` gave."""
        restored = np.empty((len(blocks), columns), dtype=np.float32)
        self._library.dequantize_row_iq4_nl(
            ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(restored.ctypes.data), ctypes.c_int64(restored.size)
        )
        return restored


def measure_ours(weight: np.ndarray, importance: np.ndarray, hessian: np.ndarray, repetitions: int) -> dict[str, Any]:
    """Every method of ours, with the error that it leaves."""
    factor = gptq.factor(hessian)
    methods: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
        "absmax": lambda rows: search.quantize(rows, None, "absmax"),
        "mse": search.quantize,
        "importance": lambda rows: search.quantize(rows, importance),
        "gptq": lambda rows: gptq.quantize(rows, factor, importance),
        "importance, numpy reference": lambda rows: codebook.quantize(rows, importance),
    }
    results: dict[str, Any] = {}
    for name, quantize in methods.items():
        rows = weight[:REFERENCE_ROWS] if "reference" in name else weight
        results[name] = measure(lambda task=quantize, rows=rows: task(rows), rows.size, repetitions)
        results[name] |= decibels(rows, codebook.dequantize(*quantize(rows)), hessian)
        results[name]["bits_per_weight"] = codebook.BITS_PER_WEIGHT
    packed, scale = search.quantize(weight, importance)
    errors = measure(lambda: quality.error_sums(weight, packed, scale, importance), weight.size, repetitions)
    results["error sums"] = errors
    return results


def measure_ggml(
    path: Path, weight: np.ndarray, importance: np.ndarray, hessian: np.ndarray, repetitions: int
) -> dict[str, Any]:
    """IQ4_NL with and without importances."""
    ggml = Ggml(path)
    results: dict[str, Any] = {}
    for name, used in (("ggml IQ4_NL", None), ("ggml IQ4_NL, importance", importance)):
        results[name] = measure(lambda used=used: ggml.quantize(weight, used), weight.size, repetitions)
        results[name] |= decibels(weight, ggml.dequantize(ggml.quantize(weight, used), weight.shape[1]), hessian)
        results[name]["bits_per_weight"] = IQ4_NL_BITS
    return results


def measure_threads(weight: np.ndarray, importance: np.ndarray, repetitions: int) -> dict[str, Any]:
    """The weighted search on as many threads as there are cores, one matrix each."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:

        def task() -> None:
            list(pool.map(lambda _: search.quantize(weight, importance), range(cores)))

        result = measure(task, weight.size * cores, repetitions)
    del result["model_hours_one_core"], result["model_hours_all_cores"]
    return {f"importance, {cores} threads": result}


def main() -> None:
    """Measure, print a line for each method, then the document."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3, help="counted runs of each method (default: %(default)s)")
    parser.add_argument("--threads", action="store_true", help="the weighted search on all cores as well")
    parser.add_argument("--ggml-library", type=Path, help="shared library of ggml to compare with")
    options = parser.parse_args()
    weight, importance, hessian = make_inputs()
    results = measure_ours(weight, importance, hessian, options.repetitions)
    if options.threads:
        results |= measure_threads(weight, importance, options.repetitions)
    if options.ggml_library is not None:
        results |= measure_ggml(options.ggml_library.resolve(), weight, importance, hessian, options.repetitions)
    for name, result in results.items():
        best, median = (result[f"{kind}_weights_per_second"] / 1e6 for kind in ("best", "median"))
        line = f"{name}: best {best:.1f}, median {median:.1f} million weights/s"
        if "model_hours_one_core" in result:
            line += f", model {result['model_hours_one_core']} core hours"
        if "sqnr_db" in result:
            line += f", {result['sqnr_db']:.2f} dB, output {result['output_sqnr_db']:.2f} dB"
        print(line)
    document = {"matrix": [ROWS, COLUMNS], "model_weights": MODEL_WEIGHTS, "cpus": os.cpu_count()}
    document |= {"machine": platform.machine(), "python": platform.python_version(), "results": results}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
