"""Checkpoints quantized by other tools: which tensors stand for a weight, in each of their formats."""
