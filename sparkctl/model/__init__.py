"""Models on disk and in memory: inspection, names, loading, adapters, streamed weights, the audit."""
