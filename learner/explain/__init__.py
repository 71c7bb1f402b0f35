"""Saliency maps and their sanity checks."""
