"""The round folder: manifest, recipe, lock, result, metrics and figure. Must not import torch."""
