"""The command `posenc`: `dispatch` finds the subcommand; what has no other home is a file here."""
