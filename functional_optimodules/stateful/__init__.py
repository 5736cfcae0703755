"""The stateful side of bricks: what is remembered between calls, compiled, saved and exchanged."""
