"""What papers claim, and what rows measured here say of it: `python -m bench.claims`."""
