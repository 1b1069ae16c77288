"""The paper's tables and figures: cells run by transformers' `Trainer`, and the published numbers."""
