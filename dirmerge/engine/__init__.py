"""Engines run a plan: they read, merge and write one tensor at a time."""
