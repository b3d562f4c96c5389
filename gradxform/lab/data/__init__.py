"""The data sets of the lab and their file formats."""
