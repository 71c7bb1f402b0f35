"""Training methods, one module each; its `train(run)` runs the phases of a round and exports the models."""
