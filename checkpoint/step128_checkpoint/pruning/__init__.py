"""Pruning: which experts of each layer stay, and the smaller checkpoint that holds only those."""
