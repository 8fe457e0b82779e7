"""The corpora that are on every machine are the same on every machine."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

import pytest

from step128_evals.corpus import python_corpus

BUILT = {
    "_sysconfigdata__linux_x86_64-linux-gnu.py": "flags = '-O3'\n",
    "_sysconfigdata__x86_64-linux-gnu.py": "flags = '-O2'\n",
    "config-3.11-x86_64-linux-gnu/python-config.py": "#!/somewhere/python\n",
    "sitecustomize.py": "import somewhere\n",
    "tkinter/__init__.py": "import _tkinter\n",
    "idlelib/run.py": "pass\n",
    "site-packages/other.py": "pass\n",
    "test/test_os.py": "pass\n",
}


def library(folder: Path, others: dict[str, str]) -> Path:
    for name, text in {"os.py": "sep = 1\n", "json/__init__.py": "loads = 2\n", **others}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_what_a_build_or_a_packager_adds_is_no_part_of_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, others in {"plain": {}, "built": BUILT}.items():
        folder = library(tmp_path / name, others)
        monkeypatch.setattr(sysconfig, "get_paths", lambda folder=folder: {"stdlib": str(folder)})
        found.append(python_corpus())
    assert [file.name for file in found[1].files] == ["json/__init__.py", "os.py"]
    assert found[0] == found[1]
    assert found[0].sha256 == found[1].sha256
    assert found[0].label == f"the standard library of Python {platform.python_version()}"


def test_the_real_one_is_large_and_has_no_file_of_the_build() -> None:
    names = [file.name for file in python_corpus().files]
    assert len(names) > 300
    assert not [name for name in names if "config-" in name or "_sysconfigdata" in name]


def test_a_folder_is_taken_whole_and_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = library(tmp_path / "code", BUILT)
    monkeypatch.chdir(folder)
    here, there = python_corpus(Path()), python_corpus(folder / ".." / "code")
    assert len(here.files) == len(BUILT) + 2
    assert (here.label, here) == ("code", there)
