"""The long-running appliance: supervisor, scheduler, status."""
