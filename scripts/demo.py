"""The whole way on a machine with no GPU: tiny checkpoint, quantize, plan, serve, ask, stop. Run by `make demo`."""

import argparse
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

BIN = Path(sys.executable).parent
START_LIMIT_SECONDS = 600  # of a cold start on two cores; a warm one takes under a minute
STOP_LIMIT_SECONDS = 60


def command(*arguments: str | Path) -> list[str]:
    """A console script of this environment, with its arguments."""
    program, *rest = map(str, arguments)
    return [str(BIN / program), *rest]


def step(title: str, *arguments: str | Path) -> None:
    """Run one command in the foreground, showing it as a user would type it; stop the demo if it fails."""
    print(f"\n== {title}\n$ {' '.join(map(str, arguments))}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command(*arguments), check=False).returncode
    if code:
        sys.exit(code)
    print(f"   ({time.monotonic() - start:.0f} s)", flush=True)


def is_ready(metrics_url: str) -> bool:
    """Whether the launcher says that the server is up and verified."""
    try:
        with urllib.request.urlopen(metrics_url, timeout=2) as answer:
            return b'step128_server_state{state="ready"} 1.0' in answer.read()
    except (urllib.error.URLError, OSError):
        return False  # the launcher is still planning, or has ended: the caller looks at the process


def start_server(arguments: list[str | Path], metrics_url: str) -> subprocess.Popen[bytes]:
    """Start `step128 serve` and wait until it is ready; ends the demo with its exit code if it does not get there."""
    print(f"\n== Serve\n$ {' '.join(map(str, arguments))}", flush=True)
    # A session of its own: Ctrl-C at the demo must not reach the server before the demo stops it in order.
    server = subprocess.Popen(command(*arguments), start_new_session=True)
    deadline = time.monotonic() + START_LIMIT_SECONDS
    try:
        while server.poll() is None and not is_ready(metrics_url):
            if time.monotonic() > deadline:
                print(f"The server was not ready after {START_LIMIT_SECONDS} s.", file=sys.stderr)
                stop_server(server)
                sys.exit(69)
            time.sleep(0.5)
    except KeyboardInterrupt:
        stop_server(server)
        sys.exit(130)
    if server.returncode is not None:
        sys.exit(server.returncode)
    return server


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server as a service manager would: SIGTERM, then wait for it to drain."""
    server.send_signal(signal.SIGTERM)
    try:
        code = server.wait(timeout=STOP_LIMIT_SECONDS)
        print(f"\nServer stopped (exit code {code}).")
    except subprocess.TimeoutExpired:
        server.kill()
        print("\nServer did not stop in time and was killed.", file=sys.stderr)


def main() -> int:
    """Run the demo; returns the exit code of the questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where checkpoints and state go")
    parser.add_argument("--policy", default="all-linears", help="quantization policy")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=9128)
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    options = parser.parse_args()

    start = time.monotonic()
    tiny, quantized, state = (options.dir / name for name in ("tiny", "tiny-nl4", "state"))
    for stale in (tiny, quantized):  # products of this script only; the trained model itself is cached elsewhere
        shutil.rmtree(stale, ignore_errors=True)
    step("A small trained Step-3.7 (cached after the first time)", "step128-checkpoint", "tiny", tiny)
    step("Quantize to NL4", "step128-checkpoint", "quantize", tiny, quantized, "--policy", options.policy)
    step("Plan", "step128", "plan", quantized, "--profile", "cpu")
    serve: list[str | Path] = ["step128", "serve", quantized, "--profile", "cpu", "--state-dir", state]
    serve += ["--port", str(options.port), "--metrics-port", str(options.metrics_port)]
    server = start_server(serve, f"http://127.0.0.1:{options.metrics_port}/metrics")
    url = f"http://127.0.0.1:{options.port}"
    end = "stop it with" if options.keep else "it is stopped at the end of the demo, or by"
    print(f"\nServing at {url}/v1, key in {state / 'api_key'}; {end}: kill {server.pid}")
    ask: list[str | Path] = ["step128-eval", "smoke", "--base-url", url, "--api-key-file", state / "api_key"]
    ask.append("--vision-plumbing-only")
    print(f"\n== Ask\n$ {' '.join(map(str, ask))}", flush=True)
    code = 130
    try:
        code = subprocess.run(command(*ask), check=False).returncode
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
    finally:
        if options.keep and code == 0:
            print(f"\nStill serving at {url}/v1. Metrics: {url}/metrics (vLLM), ", end="")
            print(f"http://127.0.0.1:{options.metrics_port}/metrics (the plan). Stop it with: kill {server.pid}")
        else:
            stop_server(server)
    print(f"Demo {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s.")
    return code


if __name__ == "__main__":
    sys.exit(main())
