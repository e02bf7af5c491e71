"""Which parameters are linear maps, which of them read the same input, and where in the network they stand."""
