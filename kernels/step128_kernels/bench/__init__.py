"""Our kernels against vLLM's and against a plain copy, on whatever GPU is there; correctness first."""
