"""The real-task benchmark: fine-tunes of a sentence encoder on text tasks, their merges, accuracies."""
