"""The native engine: our layer loop on fused operators, the same mathematics as the reference."""
