"""Run many cells, each once: over processes and machines, resumable, with learning rates searched."""
