"""A small trained Step-3.7 checkpoint with everything the big one has, made in minutes from Python's own library."""

from .make import OutputExistsError, TinyResult, make_tiny

__all__ = ["OutputExistsError", "TinyResult", "make_tiny"]
