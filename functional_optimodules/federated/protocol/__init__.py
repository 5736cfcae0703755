"""A federation between machines: a server and clients that exchange messages, whatever carries them."""
