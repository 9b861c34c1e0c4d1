"""Metrics, and the benchmarks of text-to-image models, one file each. They read folders, never checkpoints."""
