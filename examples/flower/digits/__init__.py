"""Handwritten digits of a few clients, each of whom has seen some of the digits more than others."""
