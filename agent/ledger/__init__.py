"""The ledger, one SQLite file: schema, transactions, states and the audit chain."""
