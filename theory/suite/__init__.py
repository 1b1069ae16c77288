"""The standard suite of `theory.fw_gap`: its ladders over oracle error and batch size, its tasks and its pictures."""
