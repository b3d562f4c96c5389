"""The lecture's first-order methods, one module each."""
