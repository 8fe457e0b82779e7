"""NL4 format, kernels and the out-of-tree vLLM plugin."""
