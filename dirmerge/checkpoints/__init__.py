"""Checkpoints and adapters on disk: reading, checking and writing, without any knowledge of merge methods."""
