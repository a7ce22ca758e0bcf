"""Measurements: one question a file, its baseline re-measured in the same run. `make bench` runs those for the CPU."""
