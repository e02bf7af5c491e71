"""The inner level: one map's posterior mean, the walk that feeds it what the merged model reads, and RegMean."""
