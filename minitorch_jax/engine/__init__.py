"""Stateful code run as one compiled pure function: arguments, closures, tracing, programs, calls."""
