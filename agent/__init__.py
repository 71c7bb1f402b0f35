"""The agent: owns the ledger and every decision; the only package that imports the other three."""
