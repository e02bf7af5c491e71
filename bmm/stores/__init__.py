"""Where a store (`bmm.store`) may keep its artefacts."""
