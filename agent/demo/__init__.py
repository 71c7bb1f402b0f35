"""`cxrloop demo`: the whole appliance on this machine, three nights in a few minutes."""
