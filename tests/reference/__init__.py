"""The lecture's pseudo-code, line by line, in NumPy float64."""
