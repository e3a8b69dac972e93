"""The subcommands of the command line, its options, and what they print and write."""
