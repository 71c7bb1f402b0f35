"""Training machinery: steps, optimiser, checkpoints, processes, monitors, weight averaging."""
