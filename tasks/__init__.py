"""Prefect tasks over the library's stages, and the MLflow record of a merge. No mathematics."""
