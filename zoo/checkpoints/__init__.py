"""A reference becomes a proven plan and a filled model."""
