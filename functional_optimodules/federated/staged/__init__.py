"""Data and states of more clients than fit a device."""
