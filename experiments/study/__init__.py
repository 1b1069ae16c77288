"""The offline study: methods compared on a small model and text. `control` is a preset of it."""
