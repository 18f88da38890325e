"""What several architectures share. A component takes values and modules, never an architecture's name."""
