"""One site folder: settings, keys, locks, patient splits."""
