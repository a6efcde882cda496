"""`python -m auditgap`: the command line without an installed script."""

from auditgap.cli import main

main()
