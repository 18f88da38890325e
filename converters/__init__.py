"""Checkpoints from one layout to another: names, shapes and tensors, and no model."""
