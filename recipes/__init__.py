"""The recipes that are shipped: installed as the package `sparkctl.recipes`."""
