"""The agent: owns the ledger and every decision; the only package that knows the other three."""

__version__ = "0.1.0"
