"""The command lines of ``moe-posterior`` with their help, separate from the code they run: help needs neither torch nor lightning."""
