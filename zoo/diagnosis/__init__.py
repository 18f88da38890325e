"""What is wrong with a checkpoint or a port, and where."""
