"""What the library needs of Python and JAX: signals, memory, undocumented names, XLA's faults. It knows no modules."""
