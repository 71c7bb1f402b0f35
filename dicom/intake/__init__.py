"""Judging one file: admission rules and examination in a bounded worker process."""
