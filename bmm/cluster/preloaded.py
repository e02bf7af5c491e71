"""What workers need, imported by the process that local workers are forked from (`bmm.cluster.local`)."""

from bmm.imports import import_torch_and_transformers

import_torch_and_transformers()

import distributed  # noqa: E402, F401

import bmm.prediction  # noqa: E402, F401
