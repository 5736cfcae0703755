"""Plug-ins and their hyper-parameters: what is written in a configuration, and how it is read."""
