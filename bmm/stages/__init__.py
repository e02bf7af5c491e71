"""The seven stages as plain functions, one file each: `(work, request) -> outputs`, references to artefacts.

A stage reads earlier artefacts and checkpoints by digest, makes what is missing in the store, and knows nothing of
the order of things (`bmm.pipeline`) nor of who calls it. Mathematics lives in the packages that the stages call.
"""
