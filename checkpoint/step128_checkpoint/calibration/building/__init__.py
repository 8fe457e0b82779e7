"""Builds sample sets: a mixture of sources, drawn by weight with a seed, tokenized and cut."""
