"""Prefect flows and the `bmm` command: the outermost layer, the only one that knows all others."""
