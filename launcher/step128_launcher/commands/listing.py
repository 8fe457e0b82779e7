"""`step128 profiles`: which hardware profiles are for this machine, which could run a checkpoint, and why not."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.quantization import Format
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import AUTO, Profile, choose_profile, why_not


@dataclass(frozen=True)
class ProfileEntry:
    """One profile on one machine. `runs` is None where no checkpoint was given, or the machine is another anyway.

    `broken` entries are files of the user's that cannot be read (or are not there), with the reason in `detail`.
    """

    name: str
    description: str
    fits_machine: bool
    chosen: bool
    runs: bool | None
    detail: str
    broken: bool = False


def list_entries(
    profiles: Mapping[str, Profile],
    hardware: Hardware,
    footprint: ModelFootprint | None,
    form: Format,
    broken: Mapping[str, str],
    asked: str | None,
) -> list[ProfileEntry]:
    """Return all profiles, those for this machine first; `broken` is name -> reason, `asked` is STEP128_PROFILE."""
    chosen = _chosen(profiles, hardware, asked)
    entries = [ProfileEntry(name, "", False, name == asked, None, reason, True) for name, reason in broken.items()]
    for name, profile in profiles.items():
        reason = why_not(profile, hardware)
        runs, detail = None, reason or ""
        if reason is None and footprint is not None:
            runs, detail = _runs(hardware, footprint, profile, form)
        # A name asked for means the user's file, though it is broken, and not ours of that name.
        mine = name == chosen and not (name == asked and name in broken)
        entries.append(ProfileEntry(name, profile.description, reason is None, mine, runs, detail))
    if asked and asked != AUTO and asked not in profiles and asked not in broken:
        entries.append(ProfileEntry(asked, "", False, True, None, "STEP128_PROFILE names it; no such file", True))
    return sorted(entries, key=lambda entry: (entry.broken, not entry.fits_machine, entry.name))


def _chosen(profiles: Mapping[str, Profile], hardware: Hardware, asked: str | None) -> str:
    if asked and asked != AUTO:
        return asked
    try:
        return choose_profile(profiles, hardware)
    except LauncherError:
        return ""  # none is for this machine, as each entry then says


def _runs(hardware: Hardware, footprint: ModelFootprint, profile: Profile, form: Format) -> tuple[bool, str]:
    try:
        plan = make_plan(hardware, footprint, profile, Limits(), form=form)
    except LauncherError as error:
        return False, error.message
    return True, (
        f"context {plan.max_model_len}, MTP {plan.num_speculative_tokens}, KV {plan.kv_cache_dtype}, "
        f"tensor parallel {plan.tensor_parallel_size}, {'images' if plan.vision else 'text only'}"
    )


def as_text(entries: list[ProfileEntry], model: str | None) -> str:
    """Return the list for people."""
    lines = []
    whole = [entry for entry in entries if not entry.broken]
    fitting = [entry for entry in whole if entry.fits_machine]
    if model is None:
        lines.append("PROFILES")
        lines += ["- For this machine:", *_items(fitting), "- Not for this machine:"]
    else:
        lines.append(f"PROFILES for {model}")
        lines += ["- Compatible with this machine and runnable:", *_items([entry for entry in fitting if entry.runs])]
        lines += ["- Compatible, but it does not run:", *_items([entry for entry in fitting if not entry.runs])]
        lines.append("- Incompatible with this machine:")
    lines += _items([entry for entry in whole if not entry.fits_machine])
    broken = [replace(entry, detail=f"broken: {entry.detail}") for entry in entries if entry.broken]
    return "\n".join([*lines, "- Broken:", *_items(broken)] if broken else lines)


def _items(entries: list[ProfileEntry]) -> list[str]:
    if not entries:
        return ["  (none)"]
    return [
        f"  {'*' if entry.chosen else ' '} {entry.name:16} {entry.description}".rstrip()
        + (f"\n{'':20} {entry.detail}" if entry.detail else "")
        for entry in entries
    ]
