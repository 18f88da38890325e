"""What is wrong in a checkpoint that nothing can be held against."""
