"""Starts and ends one attempt, with or without Ray. Start at `driver.py`."""
