"""Dense float64 references, written from the formulas alone: they share no code with the library and are slow."""
