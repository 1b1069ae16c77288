"""The record of tied links: in memory, on disk, tied again into the base model, and exported to PEFT."""
