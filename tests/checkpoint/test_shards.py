from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from step128_checkpoint import conversion, shards
from step128_checkpoint.cli import main
from step128_checkpoint.dtypes import from_float32, to_float32
from step128_checkpoint.errors import OutputError
from step128_checkpoint.layout import OutputTensor, plan_layout
from step128_checkpoint.policy import load_policy
from step128_checkpoint.quantize import plan_quantization
from step128_checkpoint.reader import open_checkpoint

# A run that kills itself, without warning, after a number of written bytes.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from step128_checkpoint.conversion import convert
from step128_checkpoint.policy import load_policy
from step128_checkpoint.quantize import plan_quantization
from step128_checkpoint.reader import open_checkpoint
left = int(sys.argv[3])
def count(done):
    global left
    left -= done
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
plan = plan_quantization(open_checkpoint(Path(sys.argv[1])), load_policy(), max_shard_bytes=60_000)
convert(plan, Path(sys.argv[2]), 2, False, count)
"""


def quantize(source: Path, out: Path, *options: str) -> int:
    return main(["quantize", "--method", "mse", str(source), str(out), "--max-shard-bytes", "60000", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_run(source: Path, out: Path, after_bytes: int) -> int:
    command = [sys.executable, "-c", KILLED_RUN, str(source), str(out), str(after_bytes)]
    return subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def interrupt(source: Path, out: Path, after_bytes: int) -> Path:
    """Leave an unfinished run behind; returns its work folder."""
    assert killed_run(source, out, after_bytes) == -signal.SIGKILL
    return out.with_name(out.name + ".partial")


def test_killed_at_random_points_gives_identical_bytes(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint()
    assert quantize(source, tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("model-0")]) >= 3
    total_bytes = sum(step.size_bytes for step in plan_quantization(open_checkpoint(source), load_policy()).steps)
    points = [*random.Random(128).choices(range(1, total_bytes), k=4), total_bytes]
    out = tmp_path / "resumed"
    for after_bytes in sorted(points):
        assert killed_run(source, out, after_bytes) == -signal.SIGKILL
        assert not out.exists()
    assert quantize(source, out) == 0
    assert contents(out) == whole
    assert not (tmp_path / "resumed.partial").exists()


def test_killed_around_the_rename(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    source, out = make_checkpoint(), tmp_path / "out"
    for moment in ("_publish", "remove_work"):
        with monkeypatch.context() as patched:
            patched.setattr(conversion, moment, die)
            with pytest.raises(Killed):
                quantize(source, out)
    assert quantize(source, tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole")
    capsys.readouterr()
    assert quantize(source, out, "--json") == 0, "only the clean-up was missing"
    captured = capsys.readouterr()
    assert f"{out} is complete: the earlier `quantize`" in captured.err
    assert json.loads(captured.out)["exit_code"] == 0 and "error" not in json.loads(captured.out)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    assert quantize(source, out) == 73, "a second time it is an output that exists"


@pytest.mark.parametrize("damage", ["data", "hash", "line"])
def test_tampering_is_found_and_redone(
    make_checkpoint: Callable[..., Path], tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    work = interrupt(source, out, 90_000)
    journal = work / "journal.jsonl"
    lines = journal.read_text().splitlines()
    first = json.loads(lines[1])["tensor"]
    if damage == "data":
        place = plan_quantization(open_checkpoint(source), load_policy(), max_shard_bytes=60_000).layout().places[first]
        with (work / "checkpoint" / place.file_name).open("r+b") as stream:
            stream.seek(place.offset_bytes)
            byte = stream.read(1)
            stream.seek(place.offset_bytes)
            stream.write(bytes([byte[0] ^ 1]))
    elif damage == "hash":
        lines[1] = lines[1].replace(json.loads(lines[1])["sha256"][:8], "00000000")
    else:
        lines[1] = lines[1][:20]
    journal.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert quantize(source, out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    if damage == "line":  # a damaged line hides that any work was done after it
        assert report["verified_tensors"] == 0
    else:
        assert report["redone_tensors"] in (1, 2)
        assert report["verified_tensors"] > 0
    assert quantize(source, tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_with_other_options_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    interrupt(source, out, 50_000)
    assert quantize(source, out, "--policy", "experts") == 73
    message = capsys.readouterr().err
    assert "'all-linears', now 'experts'" in message
    assert "--restart" in message
    assert quantize(source, out, "--policy", "experts", "--restart") == 0


def test_two_writers_exclude_each_other(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_quantization(open_checkpoint(make_checkpoint()), load_policy())
    work = tmp_path / "out.partial"
    work.mkdir()
    first = conversion.Journal(work, plan.fingerprint(), restart=False)
    with pytest.raises(OutputError, match="another run is writing"):
        conversion.convert(plan, tmp_path / "out", 1, False, lambda _: None)
    first.close()


def test_disk_that_fills_up_can_be_continued(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    writes = 0
    real = os.pwrite

    def full_disk(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 40:
            raise OSError(errno.ENOSPC, "no space")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(shards.os, "pwrite", full_disk)
        assert quantize(source, out) == 73
    assert "run the same command again" in capsys.readouterr().err
    assert not out.exists()
    assert quantize(source, out) == 0


def test_layout_bounds_shards_and_aligns() -> None:
    outputs = [OutputTensor(f"t{i}", "U8" if i % 2 else "F32", (10 + i,), "model.safetensors") for i in range(9)]
    outputs.append(OutputTensor("scale", "F32", (1,), "model-kvscales.safetensors"))
    layout = plan_layout(outputs, max_shard_bytes=100)
    assert set(layout.places) == {output.name for output in outputs}
    assert layout.places["scale"].file_name == "model-kvscales.safetensors"
    for output in outputs:
        place = layout.places[output.name]
        assert output.dtype == "U8" or place.offset_bytes % 4 == 0
        data_bytes = layout.file_sizes_bytes[place.file_name] - len(layout.headers[place.file_name])
        assert data_bytes <= 100
    assert json.loads(layout.index_json())["metadata"]["total_size"] == sum(output.size_bytes for output in outputs)


def test_bfloat16_rounds_to_nearest_even() -> None:
    # 1 + 1/256 and 1 + 3/256 lie midway between bfloat16 neighbours: the even one wins.
    values = np.asarray([1.0, 1 + 1 / 256, 1 + 3 / 256, 1 + 3 / 512, -0.0, np.inf, np.nan], dtype=np.float32)
    back = to_float32(from_float32(values, "BF16").tobytes(), "BF16", values.shape)
    np.testing.assert_array_equal(back, np.asarray([1, 1, 1 + 4 / 256, 1 + 2 / 256, -0.0, np.inf, np.nan], np.float32))
    assert np.signbit(back[4])
