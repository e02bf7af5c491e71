"""The report of one merge, from its merge.json: figures, an HTML page, a model card, console tables."""
