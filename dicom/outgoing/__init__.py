"""Objects that leave the site: structured reports, secondary captures, de-identified copies."""
