"""The whole pipeline on one machine: `make demo`."""
