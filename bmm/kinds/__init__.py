"""Kinds of task: what a row is, how a model reads it, where its encoder is, and what its answers are worth."""
