"""Scores and what the PACS gets of them: reports, heatmaps, the outbox, explanations."""
