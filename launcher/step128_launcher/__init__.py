"""Plan, start, verify and watch one vLLM server on one box."""
