"""Small models that are treated exactly: start at `__main__`. `problems` has the equations, for tests too."""
