"""Shared machinery of the tests: process groups, deadlines."""
