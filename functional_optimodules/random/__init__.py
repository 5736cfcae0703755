"""Keys: the ChaCha20 cipher as a generator, entropy, and the names that generators are saved under."""
