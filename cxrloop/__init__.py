"""The ground floor: what several packages share. Must not import any of them."""

__version__ = "0.2.0.dev0"
