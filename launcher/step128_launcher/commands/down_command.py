"""`step128 down`: ends the container stack, and says what stays and what is lost."""

import argparse
import sys

from step128_launcher import consoles
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.stack.compose import Compose, project_name
from step128_launcher.stack.engine import check_versions, connect, engine_errors, find_docker
from step128_launcher.stack.services import read_states, volume_names

# The end of a volume's name -> what is in it.
_HOLDS = {
    "vllm-cache": "compiled kernels: without it the next start compiles them again",
    "state": "the server's logs, plan and calibration",
    "prometheus-data": "all metrics so far",
    "grafana-data": "Grafana's users, and what was changed in its pages",
}


@engine_errors()
def run_down(options: argparse.Namespace) -> ExitCode:
    """Stop and remove. Arguments (argparse names): project_directory, project_name, volumes (bool), yes (bool).

    Raises:
        LauncherError: 2, if volumes are to be removed, nobody can be asked and --yes was not given; 69, if compose
            fails; and as `connect`, `check_versions`.

    """
    console = consoles.stderr()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    command = find_docker()
    client = connect(command)
    check_versions(client, command)
    project = project_name(options.project_name, options.project_directory)
    volumes = volume_names(client, project)
    if not read_states(client, project) and not (options.volumes and volumes):
        say(f"Nothing of {project} is up." + _kept(volumes))
        return ExitCode.OK
    if options.volumes and volumes:
        say("Lost with the volumes, for good:")
        for name in volumes:
            say(f"  {name}{_described(name)}")
        if not options.yes and not _confirmed():
            say("Nothing was done.")
            return ExitCode.OK
    compose = Compose(command, options.project_directory.resolve(), project=project)
    code = compose.run("down", "--remove-orphans", *(["--volumes"] if options.volumes else []))
    if code:
        raise LauncherError(
            ExitCode.SERVER_FAILED, f"`docker compose down` failed (exit status {code}); what it said is above."
        )
    say(f"{project} is down." + ("" if options.volumes else _kept(volumes)))
    say("Checkpoints, .env, secrets and images are as they were.")
    return ExitCode.OK


def _kept(volumes: list[str]) -> str:
    if not volumes:
        return ""
    return f" Its volumes stay, for the next start: {', '.join(volumes)}; `step128 down --volumes` removes them."


def _described(volume: str) -> str:
    return next((f": {text}" for name, text in _HOLDS.items() if volume.endswith(f"_{name}")), "")


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise LauncherError(
            ExitCode.USAGE, "--volumes asks first, and there is no terminal to ask on; nothing was done.", "Add --yes."
        )
    print("Remove them? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
