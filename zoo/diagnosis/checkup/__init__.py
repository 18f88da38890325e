"""`zoo diagnose`: what is wrong in one checkpoint, without a reference to compare it with."""
