"""Tuned configurations: names of their files, what is in them, and which one a kernel gets."""
