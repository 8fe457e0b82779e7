"""What the command line runs, one module a command, and how plans are written for people and programs."""
