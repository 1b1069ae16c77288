"""Chains inside other people's training loops; one file per framework, imported only by those who ask for it."""
