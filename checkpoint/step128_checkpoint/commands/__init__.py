"""The commands of ``step128-checkpoint``: each parses, calls one function, and prints."""
