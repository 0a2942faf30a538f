"""Training: one loop, and the objects handed to it (engine, schedule, optimiser, metrics, checkpoints, guard)."""
