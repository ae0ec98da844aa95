"""The endpoints, a module an area."""
