"""``needle``: what a model can copy out of a long context, by the public benchmark's rules or by corrected ones."""
