"""The container's health: 0 if the server is ready and answers, 1 if not.

Until the server is ready for the first time (loading takes minutes, compiling kernels up to half an hour, and the
launcher may step down to a leaner plan) it waits for the outcome. So the container stays "starting" until there is one,
and turns "healthy" or "unhealthy" at once then. Docker's own start period could do only one of the two: a long one
hides a wrong setting for as long. Once the server was ready, it answers without waiting.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

URL = "http://127.0.0.1:9128/health"
UNDER_WAY = ("planned", "starting", "verifying", "restarting")
# In the container's own /tmp, which is empty again when the container is started again.
WAS_READY = Path("/tmp/step128-was-ready")
TIMEOUT_SECONDS = 4.0
POLL_SECONDS = 2.0


def ask() -> tuple[bool, dict[str, object]]:
    """Return whether the server is healthy, and what the launcher says of it."""
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as answer:
            return True, json.load(answer)
    except urllib.error.HTTPError as error:  # 503: up, and not ready
        return False, json.load(error)


def main() -> int:
    """Wait for the end of a first start, print the state with its reason, and return the exit status."""
    while True:
        try:
            healthy, document = ask()
        except (OSError, ValueError) as error:
            print(f"the launcher does not answer on {URL}: {error}")
            return 1
        if healthy:
            WAS_READY.touch()
        if healthy or document.get("state") not in UNDER_WAY or WAS_READY.exists():
            print(" ".join(str(document[key]) for key in ("state", "reason", "hint") if document.get(key)))
            return 0 if healthy else 1
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
