"""Save models and convert checkpoints: directories, dialects, graphs and optimizer states."""
