"""The one pixel path, from stored values to a uint8 512 x 512 plate, and the quality filter."""
