"""Stands in for vLLM: the endpoints, load reports, log lines and deaths that the supervisor must cope with.

Usage: fake_vllm.py SPEC, a JSON file with port, mode, reports (file name -> document), metrics and model.
Modes: ok, die (at the start), refuse (the plugin's complaint), oom, never (no /health), die_later, stubborn (ignores
SIGTERM), late_port (address in use), sick (no /health once it was verified), die_talking (dies later, after lines that
would mean something else during the start). In every mode a child process is left running; its id is in the file that
SPEC names `child_file`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

spec = json.loads(Path(sys.argv[1]).read_text())
mode = spec["mode"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
Path(spec["child_file"]).write_text(str(child.pid))

DEATHS = {
    "die": """(EngineCore pid=7) ERROR 11-23 16:30:00 [core.py:42] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-23 16:30:00 [core.py:42] AssertionError: the real cause
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.""",
    "refuse": """(Worker pid=8) ERROR 11-23 16:30:00 [loader.py:9] ValueError: step128: missing tensor lm_head.x
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.""",
    "late_port": "OSError: [Errno 98] Address already in use",
}
if mode in DEATHS:
    print(DEATHS[mode], flush=True)
    sys.exit(1)
if mode == "oom":
    os.kill(os.getpid(), signal.SIGKILL)

print("(EngineCore pid=7) INFO 11-23 16:30:00 [core.py:1] Initializing a V1 LLM engine", flush=True)
for name, document in spec["reports"].items():
    (Path(os.environ["STEP128_LOAD_REPORT_DIR"]) / name).write_text(json.dumps(document))


verified = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        bodies = {
            "/health": "",
            "/metrics": spec["metrics"],
            "/v1/models": json.dumps({"data": [spec["model"]]}),
        }
        allowed = self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        sick = mode == "sick" and self.path == "/health" and verified.is_set()
        ready = mode != "never" and not sick and (allowed or self.path != "/v1/models")
        self.send_response(200 if self.path in bodies and ready else 503)
        self.end_headers()
        self.wfile.write(bodies.get(self.path, "").encode())
        if self.path == "/v1/models":
            verified.set()

    def log_message(self, *arguments: object) -> None:
        pass


def on_term(number: int, frame: object) -> None:
    if mode != "stubborn":
        sys.exit(0)


signal.signal(signal.SIGTERM, on_term)
server = ThreadingHTTPServer(("127.0.0.1", spec["port"]), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
if mode in ("die_later", "die_talking"):
    verified.wait()
    time.sleep(0.5)
    if mode == "die_talking":
        print("ValueError: step128: bad tensor\n[Errno 98] Address already in use", flush=True)
    print("ValueError: broken in mid-flight", flush=True)
    os._exit(3)
while True:
    time.sleep(0.05)
