"""Fetching a checkpoint from the Hugging Face hub: checked before, resumable, verified after."""
