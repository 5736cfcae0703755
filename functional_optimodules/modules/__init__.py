"""The modules: one family of algorithms a file."""
