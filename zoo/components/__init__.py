"""What several architectures share: parts that take values and modules, never a name."""
