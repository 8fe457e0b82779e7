"""A refusal with what it is about: exit 3 says as much of the model, the machine and the profile as a fitting plan."""

from dataclasses import dataclass

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.items import MemoryPlan
from step128_launcher.planning.plan import Alternative, DoesNotFitError
from step128_launcher.planning.profiles import Profile


@dataclass(frozen=True)
class Subject:
    """What was planned for."""

    profile: Profile
    footprint: ModelFootprint
    hardware: Hardware


class RefusedError(LauncherError):
    """No plan, exit 3. `memory` is None where no search was needed to refuse (a budget the machine cannot give)."""

    def __init__(
        self,
        subject: Subject,
        message: str,
        hint: str,
        remedies: tuple[str, ...],
        memory: MemoryPlan | None = None,
        host_memory: MemoryPlan | None = None,
        rejected: tuple[Alternative, ...] = (),
    ) -> None:
        super().__init__(ExitCode.DOES_NOT_FIT, message, hint)
        self.subject = subject
        self.remedies = remedies
        self.memory = memory
        self.host_memory = host_memory
        self.rejected = rejected

    @property
    def reason(self) -> str:
        """Return the message without what the header says already."""
        return self.message.removeprefix(f"{self.subject.footprint.path} does not fit with ")


def refused(error: DoesNotFitError, subject: Subject) -> RefusedError:
    """Return the planner's refusal, with its subject."""
    return RefusedError(
        subject, error.message, error.hint, error.remedies, error.memory, error.host_memory, error.rejected
    )
