"""Chains in other frameworks' training loops. Each framework has one module, which nothing else imports."""
