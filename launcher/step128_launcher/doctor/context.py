"""What every check looks at: the machine, the environment with the profile's settings, and the checkpoint, if one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.errors import LauncherError
from step128_launcher.machine.types import AMD, NVIDIA, Gpu, Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.plan import Plan
from step128_launcher.planning.profiles import Profile


@dataclass(frozen=True)
class Context:
    """`root` is where the machine's files are; `footprint` and `model` are None without a checkpoint.

    With a checkpoint and a profile there is either the `plan` that `step128 plan` makes by default, or its `refusal`.
    `log` is what a server wrote at its last start, if one is known.
    """

    hardware: Hardware
    environment: Mapping[str, str]
    profile: Profile | None
    root: Path
    configs_dir: Path
    model: Path | None = None
    footprint: ModelFootprint | None = None
    plan: Plan | None = None
    refusal: LauncherError | None = None
    log: Path | None = None

    @property
    def is_live(self) -> bool:
        """Whether this is the machine itself and not a recorded tree."""
        return self.root == Path("/")

    @property
    def amd(self) -> tuple[Gpu, ...]:
        """The AMD GPUs a process started here would see."""
        return tuple(gpu for gpu in self.hardware.usable_gpus if gpu.vendor == AMD)

    @property
    def cards(self) -> tuple[Gpu, ...]:
        """The usable AMD GPUs with memory of their own."""
        return tuple(gpu for gpu in self.amd if not gpu.integrated)

    @property
    def discrete(self) -> tuple[Gpu, ...]:
        """The usable GPUs with memory of their own, of any vendor."""
        return tuple(gpu for gpu in self.hardware.usable_gpus if not gpu.integrated)

    @property
    def is_unified(self) -> bool:
        """Whether the GPU that would serve shares the host's memory: an APU, and no card beside it."""
        usable = self.hardware.usable_gpus
        return bool(usable) and all(gpu.integrated for gpu in usable)

    def targets(self, *prefixes: str) -> tuple[str, ...]:
        """Return the usable GPUs' gfx targets that begin with one of `prefixes`, each once."""
        found = {gpu.target for gpu in self.amd if gpu.target is not None and gpu.target.startswith(prefixes)}
        return tuple(sorted(found))

    def setting(self, name: str) -> tuple[str | None, str]:
        """Return a variable's value for the server and who sets it: the user's environment goes before the profile."""
        if name in self.environment:
            return self.environment[name], "the environment"
        for own, value in self.profile.environment if self.profile else ():
            if own == name:
                return value, f"profile {self.profile.name}" if self.profile else ""
        return None, "nobody"


def why_no_cards(context: Context) -> str:
    """Return why a check that looks at AMD cards, several or one, has none to look at."""
    if any(gpu.vendor == NVIDIA for gpu in context.discrete):
        return "known of AMD cards only, and the usable cards are NVIDIA's"
    if context.is_unified:
        return f"{context.hardware.usable_gpus[0].name} shares the host's memory; this is about cards with their own"
    return "no usable card with memory of its own" if not context.cards else "one card, one rank"


def why_no_apu(context: Context) -> str:
    """Return why a check that looks at the memory of an AMD APU has none to look at."""
    usable = context.hardware.usable_gpus
    if not usable:
        return "no usable GPU"
    if context.is_unified:
        return f"only AMD APUs have one; {usable[0].name} shares the host's memory without it"
    return "the GPU that would serve has memory of its own"


def is_on(value: str | None) -> bool:
    """Whether a variable's value means yes, as vLLM and RCCL read it."""
    return value is not None and value.strip().lower() in ("1", "true", "yes", "on")


def addresses(gpus: tuple[Gpu, ...]) -> str:
    """Return the GPUs' PCI addresses for a sentence."""
    return ", ".join(gpu.pci_address for gpu in gpus)
