"""The offline study of methods on a small model and text, and the demo, a preset of it."""
