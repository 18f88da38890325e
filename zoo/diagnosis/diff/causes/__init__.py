"""Likely causes of a difference, by the kind of place in which it is first seen."""
