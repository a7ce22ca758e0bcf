"""Trains a spec on one rank. Start at `loop.py`."""
