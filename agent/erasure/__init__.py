"""Removing a patient from the site folder (`cxrloop forget`)."""
