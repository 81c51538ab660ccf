"""`python -m swiftv2`: what torchrun starts on every rank."""

from swiftv2.cli import main

raise SystemExit(main())
