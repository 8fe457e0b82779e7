"""Thresholds of a release: a YAML of figures and bounds, and an exit code."""
