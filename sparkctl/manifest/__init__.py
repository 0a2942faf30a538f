"""The run manifest: its schema, its store on disk, its lineage."""
