"""Proofs on the user's own machine: losslessness, documents that never meet, and trainings that resume."""
