"""``python -m cadiff_cli``."""

from cadiff_cli.cli import main

if __name__ == "__main__":
    main()
