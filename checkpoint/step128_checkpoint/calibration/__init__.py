"""What a calibration sweep measures: which experts and input channels matter, and how large K and V get."""
