"""Images of the site: intake, import, lists, labels, retention, export."""
