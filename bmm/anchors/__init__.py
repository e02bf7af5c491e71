"""Anchor models: the strong merge whose weights are the prior mean of the regression. One file a method."""
