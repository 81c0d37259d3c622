"""The command line, `partial-fc`: one file a command."""
