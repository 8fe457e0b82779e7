"""Hardware profiles: one YAML file each, below `configs/profiles/` or in a folder of the user's own."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Gpu, Hardware
from step128_launcher.planning.pools import device_memory
from step128_launcher.planning.profile_schema import Assumption, AttentionBackend, bad_value, read_profile_values
from step128_launcher.sizes import format_bytes
from step128_launcher.user_folders import user_folder

# The name that stands for the profile of the machine.
AUTO = "auto"

# libyaml's loader is several times as fast; some builds of PyYAML lack it.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Profile:
    """Limits and defaults for one kind of machine; the meaning of each figure is in the YAML file.

    A profile without `match_targets` is for machines with no GPU. `kv_cache_max_bytes` is over all ranks.
    `sources` says by field where a plain figure comes from; see `source`.
    """

    name: str
    description: str
    device: str
    advice: str
    match_targets: tuple[str, ...]
    match_gpus: int
    match_memory_bytes: int
    match_memory_below_bytes: int | None
    match_unified: bool
    usable_fraction: float
    host_usable_fraction: float
    reserve_bytes: int
    kv_cache_max_bytes: int | None
    mm_processor_cache_bytes: int
    api_server_bytes: int
    engine_core_bytes: int
    worker_bytes: int
    runtime_context: Assumption | None
    collectives: Assumption | None
    graphs: Assumption | None
    max_model_len: int
    min_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    min_num_batched_tokens: int | None
    num_speculative_tokens: int
    tensor_parallel_sizes: tuple[int, ...]
    memory_bandwidth: Assumption | None
    bandwidth_efficiency: Assumption | None
    all_reduce_microseconds: Assumption | None
    dtype: str
    prefer_fp8_kv_cache: bool
    block_size: int
    block_size_multiple: int
    enforce_eager: bool
    attention_backends: tuple[AttentionBackend, ...]
    arguments: tuple[str, ...]
    shutdown_timeout_seconds: int
    start_timeout_seconds: int
    environment: tuple[tuple[str, str], ...]
    sources: tuple[tuple[str, str], ...]

    def source(self, field: str) -> str:
        """Return where the figure in `field` comes from, such as "api_server_bytes" or "graphs".

        Raises:
            KeyError: the profile gives no source for that field; the schema says which have one.

        """
        value = getattr(self, field, None)
        return value.source if isinstance(value, Assumption) else dict(self.sources)[field]


def user_profiles_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the user's own profiles: STEP128_PROFILES_DIR, else below XDG_CONFIG_HOME."""
    if environment.get("STEP128_PROFILES_DIR"):
        return Path(environment["STEP128_PROFILES_DIR"])
    return user_folder("XDG_CONFIG_HOME", environment) / "profiles"


def profile_files(configs_dir: Path, user_dir: Path | None = None) -> dict[str, Path]:
    """Return name -> file of every profile, by name; a user's file takes the place of ours with its name."""
    files = {path.stem: path for path in (configs_dir / "profiles").glob("*.yaml")}
    if user_dir is not None:
        files |= {path.stem: path for path in user_dir.glob("*.yaml")}
    return dict(sorted(files.items()))


def load_profile(configs_dir: Path, name: str, user_dir: Path | None = None) -> Profile:
    """Read and check one profile.

    Raises:
        LauncherError: 78, naming the file and the key, if the profile does not exist, a key is missing, unknown or
            has a value of the wrong kind.

    """
    files = profile_files(configs_dir, user_dir)
    if name not in files:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"There is no profile {name!r} in {configs_dir / 'profiles'}" + (f" or {user_dir}." if user_dir else "."),
            "Profiles: " + (", ".join(files) or "none") + ".",
        )
    path = files[name]
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML_LOADER)  # a safe loader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"Profile {path} cannot be read: {error}") from error
    profile = Profile(name=name, **read_profile_values(path, document))
    if profile.min_model_len > profile.max_model_len:
        raise bad_value(path, "limits.min_model_len", "a value not above limits.max_model_len", profile.min_model_len)
    least_batched = profile.min_num_batched_tokens
    if least_batched is not None and least_batched > profile.max_num_batched_tokens:
        wanted = f"a value not above limits.max_num_batched_tokens ({profile.max_num_batched_tokens})"
        raise bad_value(path, "limits.min_num_batched_tokens", wanted, least_batched)
    if profile.block_size % profile.block_size_multiple:
        wanted = f"a multiple of vllm.block_size_multiple ({profile.block_size_multiple})"
        raise bad_value(path, "vllm.block_size", wanted, profile.block_size)
    if profile.device != "cpu":
        _check_gpu_profile(path, profile)
    return profile


def load_profiles(
    configs_dir: Path, user_dir: Path | None = None, only: str | None = None
) -> tuple[dict[str, Profile], dict[str, str]]:
    """Return name -> profile of all of them (of `only` that name), and name -> what is wrong with a user's own file.

    Where the user's file of a shipped name is broken, the shipped one stands.

    Raises:
        LauncherError: 78, if a shipped profile is broken.

    """
    shipped = profile_files(configs_dir)
    profiles: dict[str, Profile] = {}
    broken: dict[str, str] = {}
    for name, path in profile_files(configs_dir, user_dir).items():
        if only is not None and name != only:
            continue
        own = path != shipped.get(name)
        try:
            profiles[name] = load_profile(configs_dir, name, user_dir)
        except LauncherError as error:
            if not own:
                raise
            broken[name] = " ".join(f"{error.message} {error.hint}".split())  # YAML's complaints take lines
            if name in shipped:
                profiles[name] = load_profile(configs_dir, name)
    return profiles, broken


def _check_gpu_profile(path: Path, profile: Profile) -> None:
    """A profile for GPUs must say which, what it assumes of them, and name its attention backend."""
    wanted: dict[str, object] = {
        "match": profile.match_targets,
        "assumptions": profile.graphs,
        "speed": profile.memory_bandwidth,
        "vllm.attention_backends": profile.attention_backends,
    }
    for key, value in wanted.items():
        if not value:
            raise LauncherError(
                ExitCode.BAD_CONFIGURATION, f"Profile {path}: device {profile.device} needs the key {key}."
            )


def matching_gpus(profile: Profile, hardware: Hardware) -> tuple[Gpu, ...]:
    """Return the usable GPUs that the profile is for."""
    return tuple(gpu for gpu in hardware.usable_gpus if gpu.target in profile.match_targets)


def why_not(profile: Profile, hardware: Hardware) -> str | None:
    """Return why the profile is not for this machine, or None if it is."""
    if profile.device == "cpu":
        return "the machine has a GPU" if hardware.has_gpu or hardware.usable_gpus else None
    gpus = matching_gpus(profile, hardware)
    wanted = f"{profile.match_gpus} x {' or '.join(profile.match_targets)}"
    if not gpus:
        names = Counter(f"{gpu.name} ({gpu.target or 'unknown target'})" for gpu in hardware.usable_gpus)
        found = ", ".join(f"{count} x {name}" for name, count in names.items())
        return f"needs {wanted}; found {found or 'no GPU'}"
    if len(gpus) < profile.match_gpus:
        return f"needs {wanted}; found {len(gpus)}"
    if any(gpu.integrated != profile.match_unified for gpu in gpus):
        return "needs " + ("memory shared with the host" if profile.match_unified else "GPUs with memory of their own")
    sizes = [device_memory(hardware, gpu).total_bytes for gpu in gpus]
    if not profile.match_unified:
        if min(sizes) < profile.match_memory_bytes:
            return (
                f"needs {format_bytes(profile.match_memory_bytes)} a GPU; the smallest has {format_bytes(min(sizes))}"
            )
        below = profile.match_memory_below_bytes
        if below is not None and min(sizes) >= below:
            return f"is for GPUs of less than {format_bytes(below)}; these have {format_bytes(min(sizes))}"
    return None


def choose_profile(profiles: Mapping[str, Profile], hardware: Hardware) -> str:
    """Return the name of the profile for this machine: of those that match, the one that uses most GPUs.

    Raises:
        LauncherError: 4, with the reason of each, if none does.

    """
    reasons = {name: why_not(profile, hardware) for name, profile in profiles.items()}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if fitting:
        return max(fitting, key=lambda name: (profiles[name].match_gpus, profiles[name].match_memory_bytes))
    raise LauncherError(
        ExitCode.UNSUPPORTED_HARDWARE,
        "No profile is for this machine: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ".",
        "To serve on the CPU all the same: --profile cpu. An own profile: see CONTRIBUTING.md, 'A hardware profile'.",
    )
