"""The whole way on a machine with no GPU: tiny checkpoint, quantize, plan, serve, ask, stop. Run by `make demo`."""

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

BIN = Path(sys.executable).parent
PORT_IN_USE, SERVER_FAILED, INTERRUPTED = 75, 69, 130
START_LIMIT_SECONDS = 600  # of a cold start on two cores; a warm one takes under a minute
STOP_LIMIT_SECONDS = 60


def command(*arguments: str | Path) -> list[str]:
    """A console script of this environment, with its arguments."""
    program, *rest = map(str, arguments)
    return [str(BIN / program), *rest]


def show(title: str, arguments: list[str | Path]) -> None:
    """Print a command as a user would type it."""
    print(f"\n== {title}\n$ {' '.join(map(str, arguments))}", flush=True)


def step(title: str, *arguments: str | Path) -> None:
    """Run one command in the foreground; the demo ends with its exit code if it fails."""
    show(title, list(arguments))
    start = time.monotonic()
    code = subprocess.run(command(*arguments), check=False).returncode
    if code:
        sys.exit(code)
    print(f"   ({time.monotonic() - start:.0f} s)", flush=True)


def refuse_taken_ports(*ports: int) -> None:
    """Look before minutes of work, and before a server that still runs loses its model folder."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                print(f"Port {port} is in use, perhaps by an earlier `make demo KEEP=1`.", file=sys.stderr)
                print("Stop that, or choose others: make demo PORT=8010 METRICS_PORT=9138", file=sys.stderr)
                sys.exit(PORT_IN_USE)


def wait_until_ready(server: subprocess.Popen[bytes], state: Path) -> None:
    """Wait for this very launcher to say that its server is up and verified; ends the demo if it never does."""
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            status = json.loads((state / "status.json").read_text())
        except FileNotFoundError:
            continue  # it is still planning
        if status["launcher_pid"] == server.pid and status["state"] == "ready":
            return
    if server.returncode is None:
        print(f"The server was not ready after {START_LIMIT_SECONDS} s.", file=sys.stderr)
    sys.exit(server.returncode or SERVER_FAILED)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server as a service manager would; Ctrl-C while it drains makes it stop at once."""
    if server.poll() is not None:
        return
    server.terminate()
    while server.poll() is None:
        try:
            server.wait(timeout=STOP_LIMIT_SECONDS)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            server.terminate()  # the launcher takes a second signal as "kill it now", and cleans up
    print(f"\nServer stopped (exit code {server.returncode}).")


def interrupt(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM and SIGHUP end the demo the way Ctrl-C does: with the server stopped."""
    raise KeyboardInterrupt


def serve_and_ask(options: argparse.Namespace, model: Path, state: Path) -> int:
    """Start the server, ask, stop it (unless it is to be kept and all went well); returns the questions' exit code."""
    serve: list[str | Path] = ["step128", "serve", model, "--profile", "cpu", "--state-dir", state]
    serve += ["--port", str(options.port), "--metrics-port", str(options.metrics_port)]
    show("Serve", serve)
    # A session of its own, or Ctrl-C at the demo would reach the server before the demo stops it in order.
    server = subprocess.Popen(command(*serve), start_new_session=True)
    keep = False
    try:
        wait_until_ready(server, state)
        url = f"http://127.0.0.1:{options.port}"
        end = "stop it with" if options.keep else "the demo stops it at its end, or you with"
        print(f"\nServing at {url}/v1, key in {state / 'api_key'}; {end}: kill {server.pid}")
        ask: list[str | Path] = ["step128-eval", "smoke", "--base-url", url, "--api-key-file", state / "api_key"]
        ask.append("--vision-plumbing-only")
        show("Ask", ask)
        code = subprocess.run(command(*ask), check=False).returncode
        keep = options.keep and code == 0
        if keep:
            print(f"\nStill serving at {url}/v1. Metrics: {url}/metrics (vLLM's, with the key) and ", end="")
            print(f"http://127.0.0.1:{options.metrics_port}/metrics (the plan's). Stop it with: kill {server.pid}")
        return code
    finally:
        if not keep:
            stop_server(server)


def main() -> int:
    """Run the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where checkpoints and state go")
    parser.add_argument("--policy", default="all-linears", help="quantization policy")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=9128)
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)

    start = time.monotonic()
    tiny, quantized, state = (options.dir / name for name in ("tiny", "tiny-nl4", "state"))
    try:
        refuse_taken_ports(options.port, options.metrics_port)
        calibration = quantized.with_name(f"{quantized.name}.calibration")
        for stale in (tiny, quantized, calibration):  # products of this script only; the model is cached elsewhere
            shutil.rmtree(stale, ignore_errors=True)
        step("A small trained Step-3.7 (cached after the first time)", "step128-checkpoint", "tiny", tiny)
        quantize = ["step128-checkpoint", "quantize", tiny, quantized, "--policy", options.policy]
        step("Calibrate and quantize to NL4", *quantize, "--samples", "32", "--tokens", "512")
        step("Plan", "step128", "plan", quantized, "--profile", "cpu")
        code = serve_and_ask(options, quantized, state)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    print(f"Demo {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s.")
    return code


if __name__ == "__main__":
    sys.exit(main())
