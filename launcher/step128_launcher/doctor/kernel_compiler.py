"""Whether the Triton that would compile our kernels is the one they were compiled, counted and tuned with."""

import json

from step128_launcher.doctor.caches import TRITON, installed
from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, passed, skipped, warned


def check_triton(context: Context) -> Finding:
    """A serving image brings a Triton of its own; another release may spill registers or choose other instructions."""
    name = "triton"
    if not context.is_live:
        return skipped(name, "what is installed is not in a recorded machine's tree")
    triton = installed(TRITON)
    if triton is None:
        return skipped(name, "Triton is not installed here; look in the serving container")
    tested = tuned_with(context)
    if not tested:
        return skipped(name, "no tuned config says which Triton it was made with")
    if _minor(triton.version) in {_minor(version) for version in tested}:
        return passed(name, f"Triton {triton.version}; the kernels were tuned with {', '.join(sorted(tested))}")
    remedy = (
        "`step128-kernels inspect` compiles every kernel here and checks its gates (exit 70: one fails). In a "
        "container: docker compose run --rm --no-deps --entrypoint step128-kernels serve inspect"
    )
    return warned(name, f"Triton {triton.version}; the kernels were tuned with {', '.join(sorted(tested))}", remedy)


def tuned_with(context: Context) -> set[str]:
    """Return the releases of Triton that the shipped configs name; a file that cannot be read names none."""
    found = set()
    for path in (context.configs_dir / "tuned").glob("*.json"):
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # check_tuned_config says so
        versions = document.get("versions") if isinstance(document, dict) else None
        version = versions.get("triton") if isinstance(versions, dict) else None
        if isinstance(version, str):
            found.add(version)
    return found


def _minor(version: str) -> str:
    """Return major and minor release; patches and builds ("3.9.0+rocm7.2") make no new compiler."""
    return ".".join(version.partition("+")[0].split(".")[:2])
