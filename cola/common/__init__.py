"""Helpers for every other package: argument checks, torch's ambient modes, process groups, signals."""
