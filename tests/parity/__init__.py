"""Checks against arrays recorded from the original implementations, one module per system."""
