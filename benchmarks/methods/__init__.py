"""Every method beside every other, on the same tasks, by the same search. Start at `protocol`; `__main__` runs it."""
