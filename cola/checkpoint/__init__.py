"""Saving a run and going on with it: one `RunState`, written to a directory or into an optimizer's state dict."""
