"""What the library needs from Python and JAX: signals, memory, undocumented names, workarounds. It knows no modules."""
