"""Evals over HTTP against any OpenAI-compatible server."""
