"""Engines that bricks run in, and what they save: each is imported only when asked for."""
