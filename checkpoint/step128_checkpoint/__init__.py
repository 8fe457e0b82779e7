"""Make and change checkpoints: tiny model, prune, calibrate, quantize."""
