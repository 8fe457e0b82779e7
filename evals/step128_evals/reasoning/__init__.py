"""``reasoning``: how much is thought at each ``reasoning_effort``; and how thinking is switched on and off."""
