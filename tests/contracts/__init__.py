"""Behaviour that every implementation of a protocol must show, as classes to subclass."""
