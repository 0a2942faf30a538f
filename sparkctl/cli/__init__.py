"""The command line: options, one call into `sparkctl.steps`, and the printing of its answer."""
