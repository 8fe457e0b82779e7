"""A real all-reduce among a few ranks, checked and timed: ``python -m step128_kernels.all_reduce_probe --ranks 4``.

Prints one line of JSON: microseconds of an all-reduce by its size in bytes. Every rank compares its sums with the exact
ones. The caller sets the limit from outside (it may have to kill ranks that hang in a driver); `--limit-seconds` is a
second one, so that nothing stays behind if the caller itself is killed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

# A decode step of this model reduces 8 KiB a token and layer; prefill reduces tens of MiB.
SIZES_BYTES = {8 * 2**10: 50, 64 * 2**20: 5}  # -> repetitions
_FLOAT_BYTES = 4
_PATTERN = 251  # a prime, so that no chunk of a collective holds the same values as another
_GRACE_SECONDS = 5
_TIMES = "times.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the probe; 0 if all sums are right."""
    parser = argparse.ArgumentParser(prog="python -m step128_kernels.all_reduce_probe", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True, help="processes, one a GPU")
    parser.add_argument("--backend", choices=("gloo", "nccl"), required=True, help="gloo: CPU; nccl: GPUs, also AMD's")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="every process ends itself after this")
    parser.add_argument(
        "--folder", type=Path, default=None, help="empty folder where the ranks meet; default: a new one"
    )
    parser.add_argument("--absent", type=int, default=None, help="leave this rank out, to see what a hang looks like")
    options = parser.parse_args(arguments)
    _end_after(options.limit_seconds)
    if options.backend == "nccl" and torch.cuda.device_count() < options.ranks:
        print(f"torch sees {torch.cuda.device_count()} GPUs, {options.ranks} are needed", file=sys.stderr)
        return 1
    # All ranks are on this machine; a host name that does not resolve must not stop them.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if options.folder is not None:
        return _run(options, options.folder)
    with tempfile.TemporaryDirectory(prefix="step128-all-reduce-") as folder:
        return _run(options, Path(folder))


def _run(options: argparse.Namespace, folder: Path) -> int:
    if not _run_ranks(options, folder):
        return 1
    times = json.loads((folder / _TIMES).read_text())
    document = {
        "schema": 1,
        "backend": options.backend,
        "ranks": options.ranks,
        "torch": torch.__version__,
        "all_reduce_microseconds": times,
    }
    print(json.dumps(document))
    return 0


def _run_ranks(options: argparse.Namespace, folder: Path) -> bool:
    """Run all ranks; whether all succeeded. The first to fail ends the others, which would wait for it."""
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_rank, args=(rank, options, folder), daemon=True) for rank in range(options.ranks)]
    for process in ranks:
        process.start()
    running = list(ranks)
    while running:
        wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in ranks):
            for process in running:
                process.kill()
            return False
    return True


def _rank(rank: int, options: argparse.Namespace, folder: Path) -> None:
    """Run as one rank; rank 0 leaves the times in `folder`."""
    _end_after(options.limit_seconds)
    if rank == options.absent:
        time.sleep(options.limit_seconds + _GRACE_SECONDS)
    device = torch.device("cpu")
    if options.backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    # A file and no port: nothing to choose, and nobody else can join.
    meeting = f"file://{folder}/store"
    dist.init_process_group(options.backend, init_method=meeting, rank=rank, world_size=options.ranks)
    times = {size: _measure(size, repetitions, rank, device) for size, repetitions in SIZES_BYTES.items()}
    if rank == 0:
        (folder / _TIMES).write_text(json.dumps(times))
    dist.destroy_process_group()


def _measure(size_bytes: int, repetitions: int, rank: int, device: torch.device) -> float:
    """Return microseconds of one all-reduce of float32, checked before and after the timed ones.

    Raises:
        RuntimeError: if a sum is wrong.

    """
    pattern = torch.arange(size_bytes // _FLOAT_BYTES, device=device, dtype=torch.float32) % _PATTERN
    ranks = dist.get_world_size()
    expected = pattern * (ranks * (ranks + 1) // 2)  # whole numbers far below 2^24: exact in float32
    _reduce_and_compare(pattern * (rank + 1), expected, rank)
    buffer = torch.zeros_like(pattern)
    _wait(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        dist.all_reduce(buffer)
    _wait(device)
    seconds = time.perf_counter() - start
    _reduce_and_compare(pattern * (rank + 1), expected, rank)
    return round(seconds / repetitions * 1e6, 1)


def _reduce_and_compare(values: torch.Tensor, expected: torch.Tensor, rank: int) -> None:
    dist.all_reduce(values)
    wrong = int((values != expected).sum().item())
    if wrong:
        raise RuntimeError(f"rank {rank}: {wrong} of {values.numel()} sums are wrong")


def _wait(device: torch.device) -> None:
    """Let the device finish, and all ranks arrive."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def _end_after(seconds: float) -> None:
    """Let the kernel end this process then, whatever it hangs in (but a driver)."""
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
