"""Two models compared module by module, and the mistakes that explain the first difference."""
