"""Brings an attempt's events to the service. Start at `reporter.py`."""
