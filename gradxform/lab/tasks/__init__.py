"""What is minimised: models with data, physics, and surfaces."""
