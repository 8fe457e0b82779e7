"""Stands in for vLLM: the endpoints, load reports, log lines and deaths that the supervisor must cope with.

Usage: fake_vllm.py SPEC MAX_MODEL_LEN. SPEC is a JSON file with port, modes (one a start, the last for all later ones),
starts_file (where the starts are counted), reports (file name -> document), metrics and model.

Modes: ok; die (at the start); refuse (the plugin's complaint); memory (torch's complaint); memory_before (the same, but
it dies of something else); killed; core_killed (the engine's process was); late_port (address in use), other_port (the
same, of a port that is not named); cut_metrics (the first answer is cut short), die_verified (dies when it is asked for
its metrics); never (no /health); slow (loads with progress lines); die_later; die_talking (dies later, after lines that
would mean something else during the start); killed_later; sick (no /health once it was verified), sick_busy (besides
spins), sick_working (besides goes on generating); stubborn (ignores SIGTERM); stream (/stream answers for a second, and
SIGTERM waits for it).
In every mode a child process is left running; its id is in the file that SPEC names `child_file`.
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
spec["model"]["max_model_len"] = int(sys.argv[2])
starts_file = Path(spec["starts_file"])
starts = int(starts_file.read_text()) if starts_file.exists() else 0
starts_file.write_text(str(starts + 1))
mode = spec["modes"][min(starts, len(spec["modes"]) - 1)]
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"])
Path(spec["child_file"]).write_text(str(child.pid))

DEATHS = {
    "die": """(EngineCore pid=7) ERROR 11-23 16:30:00 [core.py:42] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-23 16:30:00 [core.py:42] AssertionError: the real cause
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.""",
    "refuse": """(Worker pid=8) ERROR 11-23 16:30:00 [loader.py:9] ValueError: step128: missing tensor lm_head.x
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.""",
    "memory": """(Worker_TP2 pid=8) ERROR 11-23 16:30:00 [multiproc_executor.py:9] torch.OutOfMemoryError: \
HIP out of memory. Tried to allocate 1.17 GiB. GPU 2 has a total capacity of 31.86 GiB of which 0.90 GiB is free.
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.""",
    "memory_before": """(Worker pid=8) WARNING 11-23 16:30:00 [a.py:9] torch.OutOfMemoryError: HIP out of memory.
torch.OutOfMemoryError: HIP out of memory. Tried to allocate 1.17 GiB.
(EngineCore pid=7) ERROR 11-23 16:30:00 [core.py:42] AssertionError: the real cause""",
    "core_killed": "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {'EngineCore': -9}",
    "late_port": f"OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', {spec['port']}): "
    "address already in use",
    "other_port": "OSError: [Errno 98] Address already in use",
}
if mode in DEATHS:
    print(DEATHS[mode], flush=True)
    sys.exit(1)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)

print("(EngineCore pid=7) INFO 11-23 16:30:00 [core.py:1] Initializing a V1 LLM engine", flush=True)
if mode == "slow":
    for shard in range(3):
        done = f"{shard * 50:3}% Completed | {shard}/2 [00:00<00:00,  2.00s/it]"
        print(f"\rLoading safetensors checkpoint shards: {done}", flush=True)
        time.sleep(0.25)
    print("(Worker pid=8) INFO 11-23 16:30:00 [m.py:1] Model loading took 1.50 GiB memory and 12.5 seconds", flush=True)
for name, document in spec["reports"].items():
    (Path(os.environ["STEP128_LOAD_REPORT_DIR"]) / name).write_text(json.dumps(document))


verified, cut = threading.Event(), threading.Event()
streams = threading.Semaphore(0)
tokens = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/stream":
            self._stream()
            return
        global tokens
        tokens += mode == "sick_working"
        bodies = {
            "/health": "",
            "/metrics": spec["metrics"] + f'vllm:generation_tokens_total{{engine="0"}} {tokens}.0\n',
            "/v1/models": json.dumps({"data": [spec["model"]]}),
        }
        allowed = self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        sick = mode.startswith("sick") and self.path == "/health" and verified.is_set()
        ready = mode != "never" and not sick and (allowed or self.path != "/v1/models")
        self.send_response(200 if self.path in bodies and ready else 503)
        if self.path == "/metrics" and mode == "die_verified":
            print("ValueError: broken while verified", flush=True)
            os._exit(3)
        if self.path == "/metrics" and mode == "cut_metrics" and not cut.is_set():
            cut.set()
            self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(bodies.get(self.path, "").encode())
        if self.path == "/v1/models":
            verified.set()

    def _stream(self) -> None:
        self.send_response(200)
        self.end_headers()
        for number in range(10):
            self.wfile.write(f"data: {number}\n".encode())
            self.wfile.flush()
            time.sleep(0.1)
        streams.release()

    def log_message(self, *arguments: object) -> None:
        pass


def on_term(number: int, frame: object) -> None:
    if mode == "stream":
        streams.acquire(timeout=5)
    if mode != "stubborn":
        sys.exit(0)


signal.signal(signal.SIGTERM, on_term)
server = ThreadingHTTPServer(("127.0.0.1", spec["port"]), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
if mode in ("die_later", "die_talking", "killed_later"):
    verified.wait()
    time.sleep(0.2)
    if mode == "killed_later":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "die_talking":
        print("ValueError: step128: bad tensor\n[Errno 98] Address already in use", flush=True)
        print("torch.OutOfMemoryError: HIP out of memory", flush=True)
    print("ValueError: broken in mid-flight", flush=True)
    os._exit(3)
if mode == "sick_busy":
    verified.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        sum(range(1000))
while True:
    time.sleep(0.05)
