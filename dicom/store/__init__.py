"""Durable files: the inbox, the content-addressed store, the drop folder."""
