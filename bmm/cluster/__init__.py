"""The Dask workers that compute, wherever they are: how they are asked for, reached, and kept at work."""
