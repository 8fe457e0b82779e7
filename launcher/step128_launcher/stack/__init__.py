"""The container stack seen from the host: its engine, its settings, checks before it starts, and how it is doing."""
