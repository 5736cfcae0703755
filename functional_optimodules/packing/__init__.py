"""Packed execution: many small leaves as few buffers, and the wrapper that gives it to any brick."""
