"""What the subcommands of the command line do that Lightning's Trainer does not."""
