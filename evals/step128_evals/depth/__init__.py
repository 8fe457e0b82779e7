"""Time to first token, prefill and decode speed by depth of the context and requests at once."""
