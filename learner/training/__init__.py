"""Training of one round: the run with its phases, training on labels, and export to a bundle's parts."""
