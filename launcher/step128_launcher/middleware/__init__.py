"""ASGI middleware that vLLM's API server loads by name: what is not allowed here never reaches vLLM.

vLLM 0.32 asks for the key below /v1, /v2, /inference and /cohere only; /invocations, for one, generates text without
it. This runs inside vLLM's process, so it imports nothing of vLLM, and of the launcher only `access`.
"""

from step128_launcher.middleware.guard import Guard

__all__ = ["Guard"]
