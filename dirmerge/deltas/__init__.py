"""Task deltas that are never formed as a whole: low-rank products, and differences of two weights."""
