"""Which model serves: approve, reject, roll back, import a model."""
