"""``tools``: conversations in which functions must be called, each fault counted by its kind."""
