"""Which parameters are linear maps, where in the network they stand, and running it a layer at a time."""
