"""Saves and resumes a run: one `RunState`, written to a directory or into an optimizer's state dict."""
