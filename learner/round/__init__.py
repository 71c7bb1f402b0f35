"""One round: recipe, manifest, the run, export, metrics and figure."""
