"""How weights become NL4: scale search, error feedback, and the error that is left.

The format and the reference of the search are in :mod:`step128_kernels.codebook`; what is here is fast, and gives the
same bytes.
"""
