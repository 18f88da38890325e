"""Likely causes of a difference, a file for each kind of module where it appears."""
