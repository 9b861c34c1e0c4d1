"""Scores: metrics, and the benchmarks of text-to-image models, one file each. It reads folders, never checkpoints."""
