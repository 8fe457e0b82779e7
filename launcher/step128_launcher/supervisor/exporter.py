"""The launcher's own port: GET /metrics for Prometheus, GET /health for whoever starts and stops containers."""

import errno
import json
import socket
import threading
from collections.abc import Iterable, Sequence
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.collectors import ServerCollector
from step128_launcher.supervisor.status import ServerStatus, Snapshot

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

_POLL_SECONDS = 0.1  # how soon `close` is noticed


class Exporter:
    """Serves the status, and what the collectors `beside` it find, on its own port and registry until it is closed.

    It is made before there is a plan, so that what goes wrong while planning can be seen there too.
    """

    def __init__(self, status: ServerStatus, host: str, port: int, beside: Sequence[Collector] = ()) -> None:
        self._status = status
        registry = CollectorRegistry(auto_describe=False)
        for collector in (ServerCollector(status), *beside):
            registry.register(collector)
        self._metrics = make_wsgi_app(registry)
        try:
            server_class = _Server6 if ":" in host else _Server
            self._server = make_server(host, port, self._answer, server_class, _SilentHandler)
        except OSError as error:
            code = ExitCode.PERMISSION if error.errno == errno.EACCES else ExitCode.PORT_IN_USE
            raise LauncherError(
                code,
                f"The metrics port {host}:{port} cannot be opened: {error.strerror}.",
                "Choose another with --metrics-port, or 0 for none.",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="exporter", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environment: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        path = environment.get("PATH_INFO")
        if path == "/metrics":
            metrics: Iterable[bytes] = self._metrics(environment, start)
            return metrics
        if path == "/health":
            now = self._status.snapshot()
            body = json.dumps(health_document(now)).encode() + b"\n"
            start("200 OK" if now.healthy else "503 Service Unavailable", [("Content-Type", "application/json")])
            return [body]
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"/metrics or /health\n"]


def health_document(now: Snapshot) -> dict[str, str | int]:
    """Return the body of /health: the state, and after a failure why, what to do, and the exit code it stands for.

    It quotes no line of vLLM's log: this port asks for no key, and a line may hold a request's text.
    """
    if now.failure is not None:
        failure = now.failure
        return {
            "state": now.state.value,
            "reason": failure.public,
            "hint": failure.hint,
            "exit_code": failure.exit_code,
        }
    if now.last_failure is not None:  # it is being started again, or will be in a moment
        return {"state": now.state.value, "reason": now.last_failure.public, "hint": now.last_failure.hint}
    if now.failed_probes:
        activity = f"; it is {now.hung.meaning}" if now.hung else ""
        return {"state": now.state.value, "reason": f"vLLM missed {now.failed_probes} health checks{activity}"}
    return {"state": now.state.value}


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request, so that one that stays open holds up none."""

    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _SilentHandler(WSGIRequestHandler):
    timeout = 10.0  # seconds; a client that sends nothing does not keep its thread

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: a line a scrape would bury what matters."""
