"""A small GPT in Flax, trained by an optimizer that a file configures, beside the same in raw optax."""
