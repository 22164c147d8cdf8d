"""The demo: real fine-tunes of a real transformer, merged by every method and evaluated on real texts."""
