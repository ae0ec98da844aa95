"""The whole plot on one machine: `make demo`."""
