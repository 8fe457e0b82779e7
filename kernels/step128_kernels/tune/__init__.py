"""``step128-kernels tune``: the fastest configuration of every kernel and shape, measured or modelled."""
