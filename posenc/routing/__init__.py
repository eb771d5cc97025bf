"""Routing of tokens to heads: the router of MoH, and what it does."""
