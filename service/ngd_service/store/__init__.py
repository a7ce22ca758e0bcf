"""Where jobs, attempts, events and metrics are kept. Start at base.py, the contract; sql.py keeps it."""
