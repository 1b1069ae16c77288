"""The Frank-Wolfe gap of a real fine-tuning run. Only these modules and `theory.llm_gap` use `cola`."""
