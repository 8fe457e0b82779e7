"""The supervisor: starts vLLM, restarts it or steps down to a leaner plan where that helps, and ends it."""

import time
from collections.abc import Callable

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.planning.plan import Plan
from step128_launcher.supervisor.attempt import Attempt
from step128_launcher.supervisor.failures import Reason, ServerFailedError
from step128_launcher.supervisor.job import Job, Patience
from step128_launcher.supervisor.preflight import await_port_free, prepare_state_dir
from step128_launcher.supervisor.progress import Progress
from step128_launcher.supervisor.restarts import RestartPolicy
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.state_files import StateFiles
from step128_launcher.supervisor.status import ServerStatus, State
from step128_launcher.supervisor.step_down import given_up, in_short

_POLL_SECONDS = 0.1
# A server that drains, and is killed then, has given its port back this long after its drain time.
_PORT_SECONDS = 15.0


class Supervisor:
    """Serves `plan` until `stop` (entered) says so; `run` is called once, from the main thread.

    `make_job` turns a plan into its Job.
    """

    def __init__(
        self,
        make_job: Callable[[Plan], Job],
        plan: Plan,
        status: ServerStatus,
        progress: Progress,
        stop: StopSignals,
        patience: Patience | None = None,
    ) -> None:
        patience = patience or Patience()
        self._make_job, self._status, self._progress, self._patience = make_job, status, progress, patience
        self._job = make_job(plan)
        self._leaner = list(plan.fallbacks[: patience.max_step_downs])
        self._given_up: list[tuple[str, ServerFailedError]] = []
        self._restarts = RestartPolicy(patience)
        self._stop = stop
        self._first = True
        self._was_ready = False

    def run(self) -> ExitCode:
        """Return 0 after a signal, whatever else went wrong on the way down.

        Raises:
            LauncherError: 75, 73 or 5 before anything is started; 3, 65, 69, 70 or 75 after it was taken down again.

        """
        self._await_port()
        prepare_state_dir(self._job.state_dir, self._job.server.load_report_dir, self._job.log)
        try:
            self._serve()
            self._status.enter(State.STOPPED)
        except LauncherError as error:
            if not self._stop:
                self._status.failed(error)
                raise
            self._progress.say(f"Told to stop; before that: {error.message}")
            self._status.enter(State.STOPPED)
        except BaseException:
            self._status.enter(State.FAILED)
            raise
        finally:
            self._progress.close()
            StateFiles(self._job, self._status, self._progress).write_status()
        return ExitCode.OK

    def _await_port(self) -> None:
        server = self._job.server
        seconds = server.shutdown_timeout_seconds + _PORT_SECONDS if self._patience.service else 0.0
        await_port_free(server.host, server.port, seconds, self._stop, self._progress.say)

    def _serve(self) -> None:
        """Start and start again until a signal comes."""
        while not self._stop:
            self._status.planned(self._job.plan)
            with Attempt(self._job, self._status, self._progress, self._stop, self._patience, self._first) as attempt:
                try:
                    attempt.run()
                    return
                except ServerFailedError as error:
                    failure = error
            self._first = False
            if self._stop:  # it came while what was left of the server was being killed
                return
            if attempt.survivors:
                raise _not_killed(attempt.survivors, failure)
            self._was_ready |= attempt.was_ready
            # The plan of a server that was ready before fits: what it lacked at a restart was not yet given back.
            if failure.reason is Reason.PORT_IN_USE and not self._patience.service:
                raise failure
            if failure.reason is Reason.OUT_OF_MEMORY and not self._was_ready:
                self._step_down(failure)
            elif self._was_ready or self._patience.service:
                self._await_restart(failure, attempt.healthy_seconds)
            else:
                raise failure
            if self._stop:
                return
            self._progress.restart()
            self._await_port()
            prepare_state_dir(self._job.state_dir, self._job.server.load_report_dir, self._job.log)

    def _step_down(self, failure: ServerFailedError) -> None:
        """Choose the next leaner plan.

        Raises:
            LauncherError: 3, with all that was tried, if there is none.

        """
        plan = self._job.plan
        self._given_up.append((in_short(plan), failure))
        if not self._leaner:
            summary = f"vLLM ran out of memory at its start with each of {len(self._given_up)} plans tried"
            tried = [f"{number}. {short}" for number, (short, _) in enumerate(self._given_up, start=1)]
            causes = [f"{text}: {each.message}" for text, (_, each) in zip(tried, self._given_up, strict=True)]
            raise LauncherError(
                ExitCode.DOES_NOT_FIT,
                "\n  ".join([f"{summary}:", *causes]),
                "Free memory, or ask for less (--max-model-len, --max-num-seqs, --num-speculative-tokens). "
                f"vLLM's logs: {self._job.log}, and .1 and so on for the plans before.",
                "\n  ".join([f"{summary}:", *tried]),
            ) from failure
        leaner = self._leaner.pop(0)
        self._status.stepped_down(failure)
        self._progress.say(
            f"Out of memory at start. {failure.message}\n"
            f"Stepping down, {len(self._leaner)} more left: {given_up(plan, leaner)}."
        )
        self._job = self._make_job(leaner)

    def _await_restart(self, failure: ServerFailedError, healthy_seconds: float) -> None:
        """Say why the server ended, and pause; a signal ends the pause.

        Raises:
            LauncherError: 69, if it was restarted often enough.

        """
        pause = self._restarts.failed(healthy_seconds)
        if not self._patience.max_restarts:
            raise failure
        if pause is None:
            tried = (
                f"vLLM was restarted {self._patience.max_restarts} times without "
                f"{self._patience.healthy_seconds:.0f} s of health in between; the last time: "
            )
            raise LauncherError(
                failure.exit_code, tried + failure.message, failure.hint, tried + failure.public
            ) from failure
        self._status.restarted(failure.reason, failure)
        self._status.enter(State.RESTARTING)
        StateFiles(self._job, self._status, self._progress).write_status()
        self._progress.say(
            f"{failure.message}\n{failure.hint}\n"
            f"Restart {self._restarts.failures} of at most {self._patience.max_restarts} in {pause:g} s."
        )
        deadline = time.monotonic() + pause
        while not self._stop and time.monotonic() < deadline:
            time.sleep(min(_POLL_SECONDS, pause))


def _not_killed(survivors: list[int], failure: ServerFailedError) -> LauncherError:
    """Return the error for processes that hold their memory and devices: another start would fail beside them."""
    processes = f"vLLM's processes {', '.join(map(str, survivors))} could not be killed, so it is not started again"
    return LauncherError(
        failure.exit_code,
        f"{processes}. {failure.message}",
        "They wait in the kernel, as a rule for a device's driver: see `dmesg`; often only a reboot ends them. "
        + failure.hint,
        f"{processes}. {failure.public}",
    )
