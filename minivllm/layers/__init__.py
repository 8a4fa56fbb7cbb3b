"""The parts that model families are made of. Each takes everything it needs as an argument: no globals, no context."""
