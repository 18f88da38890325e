"""The gates that the proof must pass: planted bugs and round trips."""
