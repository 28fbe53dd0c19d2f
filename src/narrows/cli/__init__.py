"""The command line. Each command is a module, which is imported only when the command runs."""
