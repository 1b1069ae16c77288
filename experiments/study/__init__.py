"""The offline study: methods compared on a small model and text. The demo is a preset of it."""
