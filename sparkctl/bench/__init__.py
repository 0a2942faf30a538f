"""Measurements of speed and memory on the machine at hand: a training step by stack, operators, predictions."""
