"""Perplexity of a text, and divergence from a reference, from the log-probabilities that an endpoint gives its prompt.

documents -> windows (one of three definitions) -> scores (endpoint or transformers) -> items -> summary.
"""

from step128_evals.perplexity.windows import cut_chunks, find_bos

__all__ = ["cut_chunks", "find_bos"]
