"""Examine one file: admission rules, decoding and plate, in a worker process with limits."""
