"""What the code of a compiled function names: modules, values, other code; and whether any of it has changed."""
