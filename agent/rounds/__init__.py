"""Rounds of learning: plan, train, evaluate on the golden set, store the verdict."""
