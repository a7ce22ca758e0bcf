"""Small models that are treated exactly: start at `__main__`; a problem is a module that returns curves."""
