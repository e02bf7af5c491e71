"""Gram matrices: collected by hooks, summed over shards by Dask, kept in Zarr."""
