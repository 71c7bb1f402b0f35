"""From plates to batches: plates and labels as arrays, packed plates, augmentation, feeds, token bank."""
