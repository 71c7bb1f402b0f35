"""Plates into batches: feed, packed plates, augmentation, token bank."""
