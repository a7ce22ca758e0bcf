"""Shared machinery of the tests: process groups, deadlines, services, attempts."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of this repository
