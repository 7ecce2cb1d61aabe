"""Several runs: sweeps of them, and how they compare."""
