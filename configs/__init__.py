"""Experiments. Each file is the record of one: its docstring says what it costs and what to expect."""
