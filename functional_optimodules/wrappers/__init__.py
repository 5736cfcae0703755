"""Plug-ins around the whole step of an optimizer: averages of parameters, accumulation, what is kept in which dtype."""
