"""The stress tests in their short form, and whether their checks can fail."""
