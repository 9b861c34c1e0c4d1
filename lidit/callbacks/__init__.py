"""What runs around the training step: EMA, samples, scores, throughput, guard, checkpoints, preemption, record."""
