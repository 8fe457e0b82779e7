"""What the doctor's tests share: a check run on a machine of tests/machines, changed as a case says."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.doctor import Finding
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe
from step128_launcher.machine.types import Hardware
from step128_launcher.planning.profiles import Profile

MACHINES = Path(__file__).parents[2] / "machines"
# Check, tree, change, environment, outcome, a word of its evidence or remedy. A change is a mapping of the machine's
# fields, a pair of a GPU's number (None: all) and its fields, or how many GPUs to keep.
Change = Mapping[str, Any] | tuple[int | None, Mapping[str, Any]] | int | None
Case = tuple[Callable[[Context], Finding], str, Change, dict[str, str], str, str]


@pytest.fixture
def change() -> Callable[[Hardware, Change], Hardware]:
    def apply(hardware: Hardware, wanted: Change) -> Hardware:
        if wanted is None:
            return hardware
        if isinstance(wanted, int):
            return replace(hardware, gpus=hardware.gpus[:wanted])
        if isinstance(wanted, tuple):
            number, fields = wanted
            gpus = (
                replace(gpu, **fields) if number in (None, index) else gpu for index, gpu in enumerate(hardware.gpus)
            )
            return replace(hardware, gpus=tuple(gpus))
        return replace(hardware, **wanted)

    return apply


@pytest.fixture
def context(change: Callable[[Hardware, Change], Hardware]) -> Callable[..., Context]:
    """Return a machine's context: a tree (its name, or a copy's folder), a change, an environment, a profile."""

    def make(
        tree: str | Path,
        wanted: Change = None,
        environment: Mapping[str, str] | None = None,
        profile: Profile | None = None,
        **fields: Any,
    ) -> Context:
        root = MACHINES / tree
        hardware = change(probe(root, environment or {}), wanted)
        return Context(hardware, environment or {}, profile, root, root / "no-configs", **fields)

    return make


@pytest.fixture
def look(context: Callable[..., Context]) -> Callable[..., Finding]:
    return lambda check, *arguments, **fields: check(context(*arguments, **fields))


@pytest.fixture
def expect(look: Callable[..., Finding]) -> Callable[[Case], None]:
    def compare(case: Case) -> None:
        check, tree, wanted, environment, outcome, word = case
        found = look(check, tree, wanted, environment)
        assert found.outcome == outcome, found
        assert word in found.evidence + found.remedy, found
        assert bool(found.remedy) == (outcome in ("WARN", "FAIL")), found

    return compare


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a machine's tree to change it."""

    def copy(name: str) -> Path:
        shutil.copytree(MACHINES / name, tmp_path / name, symlinks=True)
        return tmp_path / name

    return copy
