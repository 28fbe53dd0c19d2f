"""The command line: parses, calls, prints. Each subcommand is a module, imported only when it is asked for."""
