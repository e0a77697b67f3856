"""The command lines of ``moe-posterior``, each with its help, apart from what they run: help needs neither torch nor lightning."""
