"""Adapters to other libraries of the field."""
