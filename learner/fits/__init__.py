"""Models fitted without gradient steps: linear heads, shares of a blend, k-means patches, neighbour graphs."""
