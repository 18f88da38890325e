"""Models and checkpoints written back: directories, dialects, graphs, optimizer states."""
