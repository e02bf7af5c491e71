"""The inner level: the posterior mean of one linear map, and RegMean, which has no prior."""
