"""Recipes: one file a way of learning, each a straight line of phases from a manifest to a bundle's parts."""
