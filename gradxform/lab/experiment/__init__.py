"""A config: read, checked, and turned into transformations. Importing this does not import JAX."""
