"""The offline default: a tiny OPT over bytes, the text it learns from, how it was made."""
