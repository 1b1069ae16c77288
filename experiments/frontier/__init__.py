"""When a chain pays: held-out loss against bytes of trained state, over methods, ranks, lengths of run and tasks."""
