"""Small things that every other package may use: argument checks, torch's ambient modes, process groups, signals."""
