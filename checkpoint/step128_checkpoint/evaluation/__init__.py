"""How good a checkpoint is: perplexity, and what it changed against another one, with one layer in memory at a time."""
