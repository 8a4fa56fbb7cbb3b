"""The parts of `bench/simulate.py`: workloads, the cost of a step, the loop in virtual time, and the report."""
