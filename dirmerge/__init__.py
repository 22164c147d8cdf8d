"""Merging of fine-tuned models by their directions."""

__version__ = "0.1.0"
