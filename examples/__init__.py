"""What the library is for, one folder an example."""
