"""The lecture's second-order methods, one module each."""
