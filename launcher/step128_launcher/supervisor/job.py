"""What a supervised run needs: the job itself, and how patient the supervisor is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step128_launcher.command import Server
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.plan import Plan


@dataclass(frozen=True)
class Job:
    """Everything one start needs; `argv` and `environment` are what is started.

    `plan_document` is what is written to plan.json in the state folder, for `step128 calibrate` and for people.
    """

    plan: Plan
    footprint: ModelFootprint
    server: Server
    api_key: str = field(repr=False)
    argv: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    state_dir: Path
    start_timeout_seconds: float
    plan_document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def log(self) -> Path:
        """File that vLLM's output goes to."""
        return self.state_dir / "vllm.log"


@dataclass(frozen=True)
class Patience:
    """How often and how long the supervisor tries.

    `max_step_downs` leaner plans after an out-of-memory at start. `max_restarts` without `healthy_seconds` of health
    between them, after pauses that double from `first_pause_seconds` to `longest_pause_seconds`. A server that does not
    answer /health and gets nothing done for `hang_seconds` is ended and started again. A `service` has nobody beside
    it: it is also restarted when it was never ready, and a busy port is waited for. `root` is where /proc and /sys are.
    """

    max_step_downs: int = 3
    max_restarts: int = 5
    healthy_seconds: float = 600.0
    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 60.0
    hang_seconds: float = 300.0
    service: bool = False
    root: Path = Path("/")
